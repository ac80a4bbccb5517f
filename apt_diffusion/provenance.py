"""Picture files that say what they are: the IPTC's mark of generated media, and texts such as the settings.

The mark is `Iptc4xmpExt:DigitalSourceType = trainedAlgorithmicMedia` in an XMP packet, where PNG, JPEG and WebP have
their place for it.
"""

import io
from collections.abc import Mapping

from PIL import Image
from PIL.PngImagePlugin import PngInfo

MADE_BY_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_XMP = f"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" Iptc4xmpExt:DigitalSourceType="{MADE_BY_MODEL}"
 xmp:CreatorTool="apt-diffusion"/></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


def encoded(
    picture: Image.Image, kind: str = "png", texts: Mapping[str, str] | None = None, quality: int = 90
) -> bytes:
    """The picture as a file with the mark.

    Args:
        picture: in RGB.
        kind: `"png"`, `"jpeg"` or `"webp"`.
        texts: key -> text, for PNG; the other two keep the first text as their comment or leave it out.
        quality: of JPEG and WebP, from 0 to 100.

    Raises:
        KeyError: for another kind.
    """
    stream = io.BytesIO()
    texts = texts or {}
    if kind == "png":
        info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text)
        info.add_itxt("XML:com.adobe.xmp", _XMP)
        picture.save(stream, "PNG", pnginfo=info)
    elif kind == "jpeg":
        comment = {"comment": next(iter(texts.values()))} if texts else {}
        picture.save(stream, "JPEG", quality=quality, xmp=_XMP.encode(), **comment)
    else:
        picture.save(stream, FORMATS[kind], quality=quality, xmp=_XMP.encode())
    return stream.getvalue()
