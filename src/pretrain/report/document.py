"""An HTML document that needs nothing but itself: in come a title and a body, out goes the page."""

from __future__ import annotations

from importlib.resources import files

from pretrain.report.units import text

# Even a page that was tampered with may load nothing and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: str) -> str:
    """The whole page; `title` is escaped here, `body` is HTML already."""
    css = files("pretrain.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{css}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )
