"""Additions: the form that makes an image an exemplar, wherever a page has it."""

from service.console.gate import Visit, image_of
from service.console.places import exemplar_place
from service.errors import InvalidParameter
from service.intake import Form
from service.wire_collections import ChangedAnswer

_MOST_DIGITS = 4


async def add_exemplar(visit: Visit, collection: str, form: Form) -> ChangedAnswer:
    """Add the image of a form to a collection.

    Args:
        visit: in whose name.
        collection: to add it to.
        form: with the file `image`, a `label`, and what may be empty: `exemplar_id`, `note`, `source`, `frame`,
            `reason`.

    Raises:
        FormRefused, ImageTooLarge: there is no image.
        InvalidParameter: there is no label, or no number where one belongs.
        HardlookError: of the client.
    """
    _, content = image_of(form)
    label = line_of(form, "label")
    if not label:
        raise InvalidParameter("label", "it does not say to which pool or class the image is to be added")
    id = line_of(form, "exemplar_id")
    return await visit.client.collections.add(
        collection,
        (id, content) if id else content,
        label,
        source=line_of(form, "source"),
        note=text_of(form, "note"),
        frame=_frame(form),
        reason=text_of(form, "reason"),
    )


def added_place(answer: ChangedAnswer) -> tuple[str, str]:
    """Where to look at what was added, with what it would have changed, and the notice to show there."""
    [item] = answer.items
    place = exemplar_place(answer.collection, item.id)
    if answer.retroactive is not None:
        separator = "&" if "?" in place else "?"
        place += f"{separator}differ={answer.retroactive.changed}&of={answer.retroactive.compared}"
    return place, "added" if answer.changed else "unchanged"


def line_of(form: Form, field: str) -> str:
    """A field of one line, without the white space around it."""
    return form.fields.get(field, "").strip()


def text_of(form: Form, field: str) -> str:
    """A field of several lines, with the line breaks that were typed; browsers send others."""
    return form.fields.get(field, "").replace("\r\n", "\n")


def _frame(form: Form) -> int:
    text = line_of(form, "frame") or "0"
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise InvalidParameter("frame", "it is no number from 0 on")
    return int(text)
