"""The studio's own addresses, `/studio/...`: pictures, downloads and samples, each for the visitor who may see it."""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ..drawings import Drawings
from ..library import Library, download_name
from ..pages.page import SCRIPT
from ..visitors import visitor_of

PRIVATE = {"cache-control": "private, max-age=3600"}


def routes(library: Library, drawings: Drawings) -> list[Route]:
    """What is served beside the pages; names from addresses are looked up in what the visitor sees."""

    def picture(request: Request) -> Response:
        drawing = drawings.get(visitor_of(request), request.path_params["name"])
        save = "save" in request.query_params
        name = drawing.download_name if save else None
        return FileResponse(drawing.file, headers=PRIVATE, media_type="image/png", filename=name)

    def archive(request: Request) -> Response:
        visitor = visitor_of(request)
        folder = tempfile.TemporaryDirectory(prefix="apt-zip-")
        file = drawings.write_zip(visitor, Path(folder.name) / "pictures.zip")
        return FileResponse(file, filename="apt-studio-pictures.zip", background=BackgroundTask(folder.cleanup))

    def adapter(request: Request) -> Response:
        found = library.find(visitor_of(request), request.path_params["key"])
        name = download_name(found.name)
        header = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
        return Response(found.as_download(), media_type="application/octet-stream", headers=header)

    def sample(request: Request) -> Response:
        found = library.find(visitor_of(request), request.path_params["key"])
        file = next((file for file in found.samples if file.name == request.path_params["file"]), None)
        if file is None:
            raise ValueError("This sample is not there any more.")
        return FileResponse(file, headers=PRIVATE, media_type="image/png")

    def script(request: Request) -> Response:
        return FileResponse(SCRIPT, headers=PRIVATE, media_type="text/javascript")

    return [
        Route("/studio/page.js", _answering(script)),
        Route("/studio/pictures/{name}.png", _answering(picture)),
        Route("/studio/pictures.zip", _answering(archive)),
        Route("/studio/adapters/{key:path}", _answering(adapter)),
        Route("/studio/samples/{key:path}/{file}", _answering(sample)),
    ]


def _answering(work: Callable[[Request], Response]) -> Callable[[Request], Any]:
    """An endpoint for work that reads files; what is not there is a 404 with a sentence."""

    async def endpoint(request: Request) -> Response:
        with contextlib.suppress(FileNotFoundError):
            try:
                return await run_in_threadpool(work, request)
            except ValueError as error:
                return JSONResponse({"detail": str(error)}, status_code=404)
        return JSONResponse({"detail": "This file is not there any more."}, status_code=404)

    return endpoint
