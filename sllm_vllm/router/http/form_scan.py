"""Finds the fields of a multipart form as vLLM's servers do: with python-multipart, by Starlette's rules. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

SLICE_NBYTES = 1 << 16
FIELD_NBYTES_MAX = 8192
"""How many bytes of a field's value are kept."""


class NotAForm(ValueError):
    """The body can't be read as a form as vLLM would; the message is for the client."""


@dataclass(slots=True)
class FormField:
    """A part of a form. ``is_file``: it has a file name; the ``value`` of a file is not kept."""

    name: bytes = b""
    value: bytes = b""
    is_file: bool = False


def scan_form(body: bytes | memoryview, content_type: bytes, parts_max: int) -> list[FormField]:
    """The parts of a form; one that is cut off at the end is left out.

    Raises:
        NotAForm: the body is not a form, has more than ``parts_max`` parts, or names an encoding other than UTF-8.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise NotAForm("The form has no boundary.")
    if options.get(b"charset", b"utf-8").lower() not in {b"utf-8", b"utf8"}:
        raise NotAForm("The form has to be UTF-8.")
    reader = _Reader(parts_max)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        for at in range(0, len(body), SLICE_NBYTES):
            parser.write(bytes(body[at : at + SLICE_NBYTES]))
        parser.finalize()
    except FormParserError as error:
        raise NotAForm(f"The form can't be read: {error}.") from None
    return reader.fields


@dataclass(slots=True)
class _Reader:
    parts_max: int
    fields: list[FormField] = field(default_factory=list)
    _field: FormField = field(default_factory=FormField)
    _header: bytes = b""
    _header_text: bytes = b""
    _disposition: bytes | None = None

    def callbacks(self) -> dict[str, object]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in (*names, "headers_finished")}

    def _part_begin(self) -> None:
        if len(self.fields) >= self.parts_max:
            raise NotAForm(f"The form has more than {self.parts_max} parts.")
        self._field = FormField()
        self._disposition = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_text += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._header_text
        self._header = self._header_text = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise NotAForm("A part of the form has no name.")
        self._field.name = options[b"name"]
        self._field.is_file = b"filename" in options

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        room = FIELD_NBYTES_MAX - len(self._field.value)
        if not self._field.is_file and room > 0:
            self._field.value += data[start : min(end, start + room)]

    def _part_end(self) -> None:
        self.fields.append(self._field)
