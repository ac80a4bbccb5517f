"""The server's application: OpenAI's images API, adapters, health, metrics. Any painter can stand behind it."""

import asyncio
import contextlib
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from ..serving.requests import DeadlineExceeded, Draining, ImageRequest, QueueFull
from ..serving.store import AdapterStore
from ..version import __version__
from . import adapters
from .bounds import Bounds
from .forms import BASE, MAX_SEED, EditForm, GenerationForm, parse_model, requests_of
from .idempotency import Answers
from .keys import Key, Keyring
from .metrics import Metrics, Observed
from .painters import Drawn, Painter
from .pictures import as_base64, read_picture
from .refusals import Refusal
from .settings import ServerSettings
from .signing import signer_of

_JSON_BYTES = 2**17
_DISCONNECT_S = 0.25  # how often it is looked whether a client is still there
DESCRIPTION = """\
Pictures from one base model and any number of APT adapters, in the form of OpenAI's images API.

`POST /v1/images/generations` with `{"prompt": "a sks dog", "model": "dog"}` draws with the adapter `dog`; `model` is
`base`, an adapter, or a mix such as `dog:0.8+ink:0.5`. The same seed draws the same picture, whatever else the server
draws at that time. Where the server has keys, send `Authorization: Bearer KEY`.
"""
Form = TypeVar("Form", bound=GenerationForm)


class Server:
    """What the routes share.

    Args:
        painter: draws.
        store: the folder of adapters.
        settings: of the owner.
    """

    def __init__(self, painter: Painter, store: AdapterStore, settings: ServerSettings) -> None:
        self.painter = painter
        self.store = store
        self.settings = settings
        self.keyring = Keyring(settings.keys)
        self.metrics = Metrics()
        self.answers = Answers()
        self.signer = signer_of(settings)
        self.draining = False

    def key_for(self, request: Request, scope: str) -> Key:
        """The key of a request that needs this scope; `Refusal` without it."""
        key = self.keyring.key_of(request.headers.get("authorization"))
        request.state.key = key.name
        if scope not in key.scopes:
            raise Refusal(403, f"The key {key.name!r} may not {scope}.", "insufficient_scope")
        return key

    def names_for(self, key: Key) -> list[str]:
        """The adapters that a key may use."""
        return [name for name in self.store.names() if key.may_use(name)]

    async def images(self, request: Request, form: GenerationForm, body: bytes, picture: Any = None) -> Any:
        """The answer to a form: JSON, or a stream."""
        key = self.key_for(request, "generate")
        if self.draining:
            raise _busy("The server is finishing its work and takes no new requests.", 5)
        mix = parse_model(form.model, self.names_for(key))
        self.keyring.check_rate(key, form.n)
        seed = secrets.randbelow(MAX_SEED + 1) if form.seed is None else form.seed
        wanted = requests_of(form, mix, self.settings, seed, picture)
        if self.settings.log_prompts:
            request.state.prompt = form.prompt
        once = request.headers.get("idempotency-key")
        if form.stream and once is not None:
            raise Refusal(400, "A stream cannot be sent again: leave out the Idempotency-Key, or stream.")
        if form.stream:
            return await self._stream(request, key, form, wanted[0])

        async def work() -> dict[str, Any]:
            with self.keyring.running(key):
                return await self._drawn(form, wanted)

        if once is not None:
            return await self.answers.once(key.name, once, body, work)
        return await _while_connected(request, work())

    async def _drawn(self, form: GenerationForm, wanted: list[ImageRequest]) -> dict[str, Any]:
        pictures = await _all([self._last(request) for request in wanted])
        embedded = self.settings.embed_settings
        data = [
            {
                "b64_json": await asyncio.to_thread(
                    as_base64, drawn.picture, form, one if embedded else None, self.signer
                ),
                "seed": one.seed,
            }
            for drawn, one in zip(pictures, wanted, strict=True)
        ]
        width, height = pictures[0].picture.size
        return {
            "created": int(time.time()),
            "data": data,
            "output_format": form.output_format,
            "size": f"{width}x{height}",
        }

    async def _last(self, request: ImageRequest) -> Drawn:
        async with contextlib.aclosing(self._steps(request)) as steps:
            return [drawn async for drawn in steps][-1]

    async def _steps(self, request: ImageRequest) -> AsyncGenerator[Drawn, None]:
        """What the painter draws, with its errors as answers."""
        async with contextlib.aclosing(self.painter.draw(request)) as steps:
            try:
                async for drawn in steps:
                    yield drawn
            except QueueFull as error:
                raise _busy(str(error), error.retry_after_s, "overloaded") from error
            except Draining as error:
                raise _busy(str(error), 5) from error
            except DeadlineExceeded as error:
                raise Refusal(504, str(error), "timeout") from error
            except CancelledError as error:
                raise _busy("The picture was not finished because the server ends.", 5) from error
            except ValueError as error:
                raise Refusal(400, str(error).replace(f"{self.store.folder}/", "")) from error

    async def _stream(
        self, client: Request, key: Key, form: GenerationForm, request: ImageRequest
    ) -> StreamingResponse:
        """Server-sent events. What is wrong before the first one is an ordinary answer."""
        kind = "image_edit" if isinstance(form, EditForm) else "image_generation"
        stack = contextlib.ExitStack()
        stack.enter_context(self.keyring.running(key))
        steps = self._steps(request)
        try:
            first = await _while_connected(client, anext(steps))
        except BaseException:
            stack.close()
            await steps.aclose()
            raise

        async def events() -> AsyncIterator[str]:
            with stack:
                try:
                    index, drawn = 0, first
                    while True:
                        yield await asyncio.to_thread(self._event, kind, form, request, drawn, index)
                        if not drawn.is_preview:
                            return
                        index += 1
                        drawn = await anext(steps)
                except Refusal as refusal:
                    yield f"event: error\ndata: {json.dumps({'type': 'error', **refusal.body()})}\n\n"
                finally:
                    await steps.aclose()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def _event(self, kind: str, form: GenerationForm, request: ImageRequest, drawn: Drawn, index: int) -> str:
        width, height = drawn.picture.size
        what = "partial_image" if drawn.is_preview else "completed"
        embedded = self.settings.embed_settings and not drawn.is_preview
        data: dict[str, Any] = {
            "type": f"{kind}.{what}",
            "b64_json": as_base64(drawn.picture, form, request if embedded else None, self.signer),
            "created_at": int(time.time()),
            "size": f"{width}x{height}",
            "output_format": form.output_format,
            "quality": "auto",
            "background": "opaque",
            "seed": request.seed,
        }
        if drawn.is_preview:
            data |= {"partial_image_index": index, "step": drawn.step, "steps": drawn.steps}
        return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"


def build_app(painter: Painter, store: AdapterStore, settings: ServerSettings) -> FastAPI:
    """The application. `app.state.server` is the [`Server`] behind it.

    Raises:
        FileNotFoundError, ValueError: for a file of keys that cannot be read.
    """
    server = Server(painter, store, settings)
    app = FastAPI(title="apt-diffusion", version=__version__, description=DESCRIPTION)
    app.state.server = server
    _add_pictures(app, server)
    _add_adapters(app, server)
    _add_health(app, server)
    _add_errors(app)
    app.add_middleware(Bounds, max_bytes=functools.partial(_body_limit, settings))
    app.add_middleware(Observed, metrics=server.metrics)  # the outermost: it sees what Bounds refuses
    return app


def _body_limit(settings: ServerSettings, path: str) -> int:
    if path.startswith("/v1/adapters/"):
        return settings.max_adapter_bytes
    return settings.max_picture_bytes + _JSON_BYTES if path == "/v1/images/edits" else _JSON_BYTES


def _add_pictures(app: FastAPI, server: Server) -> None:
    @app.post("/v1/images/generations", summary="Draw pictures", openapi_extra=_body_of(GenerationForm))
    async def generations(request: Request) -> Any:
        """Pictures as `b64_json`, or with `stream` as server-sent events `image_generation.partial_image` and
        `image_generation.completed`. `Idempotency-Key`: sent again, it gets the same answer."""
        body = await request.body()
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "The body is no JSON.") from error
        if not isinstance(values, dict):
            raise Refusal(400, 'The body must be an object, such as {"prompt": "a sks dog", "model": "dog"}.')
        return await server.images(request, _form(GenerationForm, values), body)

    @app.post("/v1/images/edits", summary="Start from a picture", openapi_extra=_body_of(EditForm, with_image=True))
    async def edits(request: Request) -> Any:
        """Fields of a form, and `image`: a PNG, JPEG or WebP that is drawn anew, as far as `strength` says."""
        server.key_for(request, "generate")  # before a body of megabytes is read
        async with request.form(max_files=2, max_fields=50, max_part_size=_JSON_BYTES) as parts:
            files = [part for name, part in parts.multi_items() if isinstance(part, UploadFile)]
            fields = {name: part for name, part in parts.multi_items() if not isinstance(part, UploadFile)}
            names = [name for name, part in parts.multi_items() if isinstance(part, UploadFile)]
            if names not in (["image"], ["image[]"]):
                raise Refusal(
                    400, "Send one file, `image`; masks and several pictures are not known here.", param="image"
                )
            data = await files[0].read(server.settings.max_picture_bytes + 1)
        if len(data) > server.settings.max_picture_bytes:
            raise Refusal(413, f"A picture may have {server.settings.max_picture_bytes / 2**20:.0f} MiB.", "too_large")
        form = _form(EditForm, fields)
        picture = await asyncio.to_thread(read_picture, data)
        return await server.images(request, form, data + json.dumps(fields, sort_keys=True).encode(), picture)

    @app.get("/v1/models", summary="The base model and the adapters")
    async def models(request: Request) -> dict[str, Any]:
        """In OpenAI's form; `id` is what `model` of a request may be."""
        names = server.names_for(server.key_for(request, "generate"))
        return {"object": "list", "data": [_model(server, name) for name in (BASE, *names)]}

    @app.get("/v1/models/{name}", summary="One of them")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """As in the list."""
        if name not in (BASE, *server.names_for(server.key_for(request, "generate"))):
            raise Refusal(404, f"There is no model {name[:100]!r}: see GET /v1/models.", "model_not_found", "model")
        return _model(server, name)


def _model(server: Server, name: str) -> dict[str, Any]:
    created = 0
    if name != BASE:
        with contextlib.suppress(ValueError, OSError):  # it is being replaced
            created = int(server.store.file(name).stat().st_mtime)
    return {"id": name, "object": "model", "created": created, "owned_by": "apt-diffusion"}


def _add_adapters(app: FastAPI, server: Server) -> None:
    @app.put("/v1/adapters/{name}", summary="Upload or replace an adapter", status_code=201)
    async def put(request: Request, name: str, response: Response) -> dict[str, Any]:
        """The body is the .safetensors file. It is checked as it would be when it is loaded; until then, and if it
        cannot be used, the former one stays."""
        key = server.key_for(request, "manage")
        if not key.may_use(name):
            raise Refusal(403, f"The key {key.name!r} may not use adapters of this name.", "insufficient_scope")
        limit = server.settings.max_adapter_bytes
        is_new = await adapters.upload(server.store, name, request.stream(), limit, server.painter.check_adapter)
        response.status_code = 201 if is_new else 200
        return _model(server, name)

    @app.delete("/v1/adapters/{name}", summary="Delete an adapter")
    async def delete(request: Request, name: str) -> dict[str, Any]:
        """Pictures that are being drawn with it are finished."""
        key = server.key_for(request, "manage")
        if not key.may_use(name):
            raise Refusal(403, f"The key {key.name!r} may not use adapters of this name.", "insufficient_scope")
        adapters.delete(server.store, name)
        return {"id": name, "object": "model", "deleted": True}


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/healthz", summary="Whether the server runs", response_class=PlainTextResponse)
    async def healthz() -> str:
        """For the supervisor that would start it anew."""
        return "ok"

    @app.get("/readyz", summary="Whether it takes requests", response_class=PlainTextResponse)
    async def readyz() -> str:
        """For the load balancer: 503 while it ends."""
        if server.draining or not await server.painter.is_ready():
            raise _busy("The server takes no new requests.", 5)
        return "ready"

    @app.get("/metrics", summary="Numbers for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Batch sizes, queue, seconds of passes, where adapters were found, answers and their seconds."""
        return Response(server.metrics.text(await server.painter.statistics()), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return Refusal(400, _sentence(error.errors())).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return Refusal(500, "Something unexpected went wrong; it is in the server's log.", "internal_error").response()


def _busy(message: str, seconds: float, code: str = "unavailable") -> Refusal:
    return Refusal(503, message, code, headers={"Retry-After": str(max(1, round(seconds)))})


async def _all(works: list[Any]) -> list[Any]:
    """All results; after the first error the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_DISCONNECT_S))[0]:
            if await request.is_disconnected():
                raise Refusal(499, "The client has left.")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _form(kind: type[Form], values: Mapping[str, Any]) -> Form:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        raise Refusal(400, _sentence(errors), param=str(errors[0]["loc"][0]) if errors[0]["loc"] else None) from error


def _sentence(errors: Any) -> str:
    """All that is wrong with a form."""
    parts = []
    for error in errors[:5]:
        place = ".".join(str(part) for part in error["loc"])
        parts.append(f"{place}: {error['msg']}" if place else error["msg"])
    return "; ".join(parts)[:1000] + "."


def _body_of(form: type[BaseModel], with_image: bool = False) -> dict[str, Any]:
    """The form's fields, for the page that explains the routes."""
    schema = form.model_json_schema()
    if with_image:
        schema["properties"]["image"] = {"type": "string", "format": "binary"}
        schema["required"] = [*schema.get("required", ()), "image"]
    kind = "multipart/form-data" if with_image else "application/json"
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}
