# SPDX-License-Identifier: Apache-2.0

"""The images' side of the page: bringing them, turning their pages, setting their window."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import events, ui

from gmai_xtuner.core.imaging.windows import PRESETS, Window
from gmai_xtuner.demo.conversation import Attached, Session
from gmai_xtuner.demo.files import Example, open_files
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.studies import MEBIBYTE, Axis, Memory, Study, View
from gmai_xtuner.demo.widgets import Panel, chips, data_url, image_element

_LEFT_SIDE: dict[Axis, str] = {"x": "A", "y": "R", "z": "R"}
"""What lies on the left of a volume's slice, as viewers mark it: anterior, or the patient's right."""

_LOG = logging.getLogger(__name__)


class ImagePanel(Panel):
    """Draws the tray and the chosen image; ``opening`` bounds the uploads that are decoded at once."""

    def __init__(
        self,
        session: Session,
        memory: Memory,
        *,
        examples: Sequence[Example],
        opening: asyncio.Semaphore,
    ) -> None:
        super().__init__(session, memory, notice="image-notice")
        self.examples, self.opening = examples, opening
        self._picture: Any = None
        self._wanted: View | None = None
        self._rendering = False
        self.refresh_checkbox: Callable[[], None] = lambda: None
        """Shows what goes with the next question."""

    def draw(self) -> None:
        """Draw everything in the language of now."""
        language, most = self.session.language, self.session.limits.upload_bytes
        ui.label(self.say("images")).classes("panel-title").props("role=heading aria-level=2")
        # FastAPI remembers the function behind an upload (fastapi/dependencies/models.py, lru_cache) when
        # its page has long been closed; it must not keep the visitor's images as well.
        own = weakref.proxy(self)
        upload = ui.upload(
            label=self.say("drop"),
            multiple=True,
            auto_upload=True,
            max_total_size=most,
            on_multi_upload=lambda event: own._uploaded(event),
            on_rejected=lambda: own.tell(
                PageError("upload_too_large", limit=f"{most / MEBIBYTE:g}")
            ),
        )
        upload.props("flat bordered no-thumbnails data-testid=upload").classes("upload")
        upload.on("failed", lambda: own.tell(PageError("upload_failed")), args=[])
        ui.label(self.say("accepted", limit=max(1, most // MEBIBYTE))).classes("hint")
        if self.examples:
            examples = [(one.name[language], one.path) for one in self.examples]
            chips(
                self.say("examples"),
                [
                    (f"example-{number}", file[0], partial(self._open, [file]))
                    for number, file in enumerate(examples)
                ],
            )
        self.place_notices()
        self._tray = ui.element("div").classes("tray")
        self._viewer = ui.element("div").classes("viewer")
        self.draw_images()

    def draw_images(self) -> None:
        """Draw the tray and the chosen image."""
        session = self.session
        self.refresh_checkbox = lambda: None
        self._tray.clear()
        with self._tray:
            if not session.tray:
                ui.label(self.say("no_images")).classes("hint")
            for one in session.tray if len(session.tray) > 1 else ():
                look = "unelevated" if one.number == session.chosen else "outline"
                button = ui.button(str(one.number), on_click=partial(self._choose, one.number))
                button.props(f"no-caps dense {look} data-testid=tray-{one.number}")
                button.props["aria-label"] = self.say("image_number", number=one.number)
        self._viewer.clear()
        if session.chosen is not None:
            with self._viewer:
                self._draw_viewer(session.image(session.chosen))

    # --- the chosen image ---

    def _draw_viewer(self, one: Attached) -> None:
        facts, number = one.study.facts, self.say("image_number", number=one.number)
        kind = facts.kind if facts.kind != "picture" else ""
        about = " · ".join(text for text in (number, kind, facts.modality, facts.size) if text)
        with ui.element("div").classes("viewer-head"):
            ui.label(about).props("data-testid=image-facts")
            remove = ui.button(icon="delete_outline", on_click=partial(self._remove, one.number))
            remove.props("flat dense round size=sm data-testid=remove")
            remove.props["aria-label"] = self.say("remove")
        with ui.element("div").classes("framed"):
            url = data_url(one.study.render(one.view))
            self._picture = image_element(url, about=number, name="picture").classes("picture")
            if one.view.axis in _LEFT_SIDE and "no_orientation" not in facts.notes:
                ui.label(_LEFT_SIDE[one.view.axis]).classes("side").props("data-testid=left-side")
        for note in facts.notes:
            ui.label(self.say(note)).classes("warning")
        self._draw_choices(one, one.study)

        def set_send(event: events.ValueChangeEventArguments) -> None:
            one.send = event.value
            refresh_checkbox()

        send = ui.checkbox("", value=one.send, on_change=set_send).props("data-testid=send")

        def refresh_checkbox() -> None:
            send.text = self.say(
                "will_send" if one.send else "was_sent" if one.sent else "not_sent"
            )
            send.value = one.send

        refresh_checkbox()
        self.refresh_checkbox = refresh_checkbox

    def _draw_choices(self, one: Attached, study: Study) -> None:
        axis = one.view.axis
        if len(study.axes) > 1:
            ui.toggle(
                {key: self.say(key) for key in study.axes},
                value=axis,
                on_change=lambda e: self._turn_axis(one, e.value),
            ).props("no-caps dense unelevated data-testid=axis")
        if axis is not None and (last := study.length(axis) - 1):
            index = self._place_slider(one, "frame" if axis == "frame" else "slice", "index", last)
            self._picture.on(
                "wheel",
                lambda e: index.set_value(
                    min(last, max(0, one.view.index + (1 if e.args["deltaY"] > 0 else -1)))
                ),
                js_handler="(event) => { event.preventDefault(); emit({deltaY: event.deltaY}); }",
                throttle=0.05,
            )
        if study.channels > 1:
            self._place_slider(one, "channel", "channel", study.channels - 1)
        if study.window is not None:
            self._draw_window(one, study, study.window)

    def _place_slider(self, one: Attached, label: str, field: str, last: int) -> ui.slider:
        slider = self._slider(
            label,
            getattr(one.view, field),
            (0, last, 1),
            shown=lambda value: f"{int(value) + 1} / {last + 1}",
            changed=lambda value: self._show(one, **{field: int(value)}),
        )
        return slider.props("data-testid=slice") if field == "index" else slider

    def _draw_window(self, one: Attached, study: Study, default: Window) -> None:
        presets = PRESETS if study.hounsfield else {}
        low, high = study.extent
        shown = default if one.view.window == "file" else one.view.window
        span = max(high - low, default.width, 1e-6)
        step = 1.0 if span > 20 else span / 1000
        busy = False  # a preset moves the sliders, which must not be taken for a hand

        def by_hand(_: float) -> None:
            nonlocal busy
            if busy:
                return
            self._show(one, window=Window(float(center.value), max(float(width.value), step)))
            busy = True
            choice.value = "custom"
            busy = False

        def by_name(event: events.ValueChangeEventArguments) -> None:
            nonlocal busy
            if busy or event.value == "custom":
                return
            window = presets.get(event.value, default)
            busy = True
            center.value, width.value = window.center, window.width
            busy = False
            self._show(one, window="file" if event.value == "file" else window)

        names: dict[object, str] = {window: key for key, window in presets.items()}
        names["file"] = "file"
        choice = ui.select(
            {
                "file": self.say("file" if study.own_window else "default"),
                **{key: self.say(key) for key in (*presets, "custom")},
            },
            value=names.get(one.view.window, "custom"),
            label=self.say("window"),
            on_change=by_name,
        ).props("dense options-dense outlined data-testid=window")
        ends = [low, high, default.center, *(window.center for window in presets.values())]
        widest = max(span, *(window.width for window in presets.values()), step)
        number = "{:.0f}".format if step == 1.0 else "{:.3g}".format
        bounds = {"center": (min(ends), max(ends), step), "width": (step, widest, step)}
        center, width = (
            self._slider(key, getattr(shown, key), bounds[key], shown=number, changed=by_hand)
            for key in bounds
        )

    def _slider(
        self,
        name: str,
        value: float,
        bounds: tuple[float, float, float],
        *,
        shown: Callable[[float], str],
        changed: Callable[[float], None],
    ) -> ui.slider:
        """Place a slider that words and tests call ``name``, from low to high by a step."""
        low, high, step = bounds
        with ui.element("div").classes("slider"):
            ui.label(self.say(name))
            slider = ui.slider(
                min=low, max=high, step=step, value=value, on_change=lambda e: changed(e.value)
            ).props(f"data-testid={name}")
            ui.label().classes("number").bind_text_from(slider, "value", shown)
        slider.props["aria-label"] = self.say(name)
        return slider

    # --- what is done with them ---

    def _show(self, one: Attached, **changes: Any) -> None:
        one.turn_to(replace(one.view, **changes))
        self.refresh_checkbox()
        self._wanted = one.view
        if not self._rendering:
            self._rendering = True
            with self._viewer:
                ui.timer(0, lambda: self._render(one), once=True)

    async def _render(self, one: Attached) -> None:
        """Render the newest view in a thread; views that came in between are left out."""
        try:
            while self._wanted is not None:
                view, self._wanted = self._wanted, None
                url = await asyncio.to_thread(lambda: data_url(one.study.render(view)))  # noqa: B023
                if self.session.chosen == one.number and not self.session.closed:
                    self._picture.props["src"] = url
        finally:
            self._rendering = False

    def _turn_axis(self, one: Attached, axis: Axis) -> None:
        one.turn_to(replace(one.view, axis=axis, index=one.study.length(axis) // 2))
        self.draw_images()

    def _choose(self, number: int) -> None:
        self.session.chosen = number
        self.draw_images()

    def _remove(self, number: int) -> None:
        self.memory.give_back(self.session.remove(number).study.nbytes)
        self.draw_images()

    async def _uploaded(self, event: events.MultiUploadEventArguments) -> None:
        with tempfile.TemporaryDirectory(prefix="gmai_demo_") as folder:
            files = []
            for number, file in enumerate(event.files):
                path = Path(folder) / str(number)
                await file.save(path)
                files.append((file.name, path))
            await self._open(files)
        event.sender.reset()  # type: ignore[attr-defined]

    async def _open(self, files: Sequence[tuple[str, Path]]) -> None:
        try:
            async with self.opening:
                opened = await asyncio.to_thread(open_files, files, self.session.limits)
        except Exception:  # no visitor is shown a traceback, whatever the damage
            _LOG.exception("an upload could not be opened")
            self.tell(PageError("damaged"))
            return
        if self.session.closed:
            return
        errors: list[tuple[str, PageError]] = []
        for name, study in opened:
            try:
                if isinstance(study, PageError):
                    raise study
                with self.memory.taken(study.nbytes):
                    self.session.attach(study)
            except PageError as error:
                errors.append((name, error))
        self.tell(*errors)
        self.draw_images()
