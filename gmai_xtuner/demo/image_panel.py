# SPDX-License-Identifier: Apache-2.0

"""The images' side of the page: bringing them, turning their pages, setting their window."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nicegui import events, ui

from gmai_xtuner.core.imaging.windows import PRESETS, Window
from gmai_xtuner.demo.conversation import Attached, Session
from gmai_xtuner.demo.examples import Example
from gmai_xtuner.demo.files import open_files
from gmai_xtuner.demo.i18n import PageError, say
from gmai_xtuner.demo.limits import MEBIBYTE, Memory
from gmai_xtuner.demo.studies import Axis, Study, View
from gmai_xtuner.demo.widgets import Notices, data_url, named, picture_element

_LEFT_SIDE: dict[Axis, str] = {"x": "A", "y": "R", "z": "R"}
"""What lies on the left of a volume's picture, as viewers mark it: anterior, or the patient's right."""

_LOG = logging.getLogger(__name__)


class ImagePanel:
    """Draws the tray and the chosen image.

    Args:
        session: of the visitor.
        memory: of all visitors.
        examples: to pick from.
        opening: how many uploads are decoded at once, of all visitors.
    """

    def __init__(
        self,
        session: Session,
        memory: Memory,
        *,
        examples: Sequence[Example],
        opening: asyncio.Semaphore,
    ) -> None:
        self.session = session
        self.memory = memory
        self.examples = examples
        self.opening = opening
        self.notices = Notices(lambda: session.language, name="image-notice")
        self._picture: Any = None
        self._wanted: View | None = None
        self._rendering = False
        self._said: list[Callable[[], None]] = []

    def draw(self) -> None:
        """Everything, in the language of now."""
        language, limits = self.session.language, self.session.limits
        ui.label(say("images", language)).classes("panel-title").props("role=heading aria-level=2")
        upload = (
            ui.upload(
                label=say("drop", language),
                multiple=True,
                auto_upload=True,
                max_total_size=limits.upload_bytes,
                on_multi_upload=self._uploaded,
                on_rejected=self._too_large,
            )
            .props("flat bordered no-thumbnails")
            .classes("upload")
        )
        upload.on("failed", self._failed, args=[])
        named(upload, "upload")
        limit = max(1, limits.upload_bytes // MEBIBYTE)
        ui.label(say("accepted", language, limit=limit)).classes("hint")
        if self.examples:
            with ui.element("div").classes("chips"):
                ui.label(say("examples", language)).classes("hint")
                for number, example in enumerate(self.examples):
                    button = ui.button(
                        example.name[language], on_click=lambda _, one=example: self._example(one)
                    ).props("outline no-caps dense size=12px")
                    named(button, f"example-{number}")
        self.notices.place()
        self._tray = ui.element("div").classes("tray")
        self._viewer = ui.element("div").classes("viewer")
        self.draw_images()

    def draw_images(self) -> None:
        """The tray and the chosen image."""
        self._said.clear()
        session, language = self.session, self.session.language
        self._tray.clear()
        with self._tray:
            if not session.tray:
                ui.label(say("no_images", language)).classes("hint")
            if len(session.tray) > 1:
                for one in session.tray:
                    button = ui.button(
                        str(one.number), on_click=lambda _, n=one.number: self._choose(n)
                    ).props(
                        "no-caps dense "
                        + ("unelevated" if one.number == session.chosen else "outline")
                    )
                    button.props["aria-label"] = say("image_number", language, number=one.number)
                    named(button, f"tray-{one.number}")
        self._viewer.clear()
        if session.chosen is not None:
            with self._viewer:
                self._draw_viewer(session.image(session.chosen))

    def told_sent(self) -> None:
        """What goes with the next question has changed."""
        for tell in self._said:
            tell()

    # --- the chosen image ---

    def _draw_viewer(self, one: Attached) -> None:
        language, study = self.session.language, one.study
        facts = study.facts
        about = " · ".join(
            text
            for text in (facts.kind if facts.kind != "picture" else "", facts.modality, facts.size)
            if text
        )
        with ui.element("div").classes("viewer-head"):
            named(
                ui.label(f"{say('image_number', language, number=one.number)} · {about}"),
                "image-facts",
            )
            remove = ui.button(icon="delete_outline", on_click=lambda: self._remove(one.number))
            remove.props("flat dense round size=sm")
            remove.props["aria-label"] = say("remove", language)
            named(remove, "remove")
        with ui.element("div").classes("framed"):
            self._picture = picture_element(
                data_url(one.study.render(one.view)),
                about=say("image_number", language, number=one.number),
                name="picture",
            ).classes("picture")
            if one.view.axis in _LEFT_SIDE and "no_orientation" not in facts.notes:
                named(ui.label(_LEFT_SIDE[one.view.axis]).classes("side"), "left-side")
        for note in facts.notes:
            ui.label(say(note, language)).classes("warning")
        self._draw_sliders(one, study)
        send = ui.checkbox("", value=one.send, on_change=lambda e: self._set_send(one, e.value))
        named(send, "send")

        def tell() -> None:
            key = "will_send" if one.send else "was_sent" if one.sent else "not_sent"
            send.text = say(key, self.session.language)
            send.value = one.send

        tell()
        self._said.append(tell)

    def _draw_sliders(self, one: Attached, study: Study) -> None:
        language = self.session.language
        if len(study.axes) > 1:
            axes = {axis: say(axis, language) for axis in study.axes}
            named(
                ui.toggle(
                    axes, value=one.view.axis, on_change=lambda e: self._turn_axis(one, e.value)
                ).props("no-caps dense unelevated"),
                "axis",
            )
        if one.view.axis is not None:
            label = say("frame" if one.view.axis == "frame" else "slice", language)
            last = study.length(one.view.axis) - 1
            if last:
                index = self._slider(
                    label,
                    "slice",
                    one.view.index,
                    0,
                    last,
                    1,
                    shown=lambda v: f"{int(v) + 1} / {last + 1}",
                    changed=lambda v: self._show(one, index=int(v)),
                )
                self._picture.on(
                    "wheel",
                    lambda e: index.set_value(
                        min(last, max(0, one.view.index + (1 if e.args["deltaY"] > 0 else -1)))
                    ),
                    js_handler="(event) => { event.preventDefault(); emit({deltaY: event.deltaY}); }",
                    throttle=0.05,
                )
        if study.channels > 1:
            count = study.channels
            self._slider(
                say("channel", language),
                "channel",
                one.view.channel,
                0,
                count - 1,
                1,
                shown=lambda v: f"{int(v) + 1} / {count}",
                changed=lambda v: self._show(one, channel=int(v)),
            )
        if study.window is not None:
            self._draw_window(one, study, study.window)

    def _draw_window(self, one: Attached, study: Study, default: Window) -> None:
        language = self.session.language
        keys = ["file", *(PRESETS if study.hounsfield else ()), "custom"]
        low, high = study.extent
        shown = default if one.view.window == "file" else one.view.window
        span = max(high - low, default.width, 1e-6)
        step = 1.0 if span > 20 else span / 1000
        busy = False  # a preset moves the sliders, which must not be taken for a hand

        def preset_of(window: object) -> str:
            if window == "file":
                return "file"
            return next(
                (key for key, value in PRESETS.items() if value == window and key in keys), "custom"
            )

        def by_hand(_: float) -> None:
            nonlocal busy
            if busy:
                return
            window = Window(float(center.value), max(float(width.value), step))
            self._show(one, window=window)
            busy = True
            choice.value = "custom"
            busy = False

        def by_name(event: events.ValueChangeEventArguments) -> None:
            nonlocal busy
            if busy or event.value == "custom":
                return
            window = default if event.value == "file" else PRESETS[event.value]
            busy = True
            center.value, width.value = window.center, window.width
            busy = False
            self._show(one, window="file" if event.value == "file" else window)

        choice = ui.select(
            {
                key: say("default" if key == "file" and not study.own_window else key, language)
                for key in keys
            },
            value=preset_of(one.view.window),
            label=say("window", language),
            on_change=by_name,
        ).props("dense options-dense outlined")
        named(choice, "window")
        ends = [
            low,
            high,
            default.center,
            *(w.center for w in PRESETS.values() if study.hounsfield),
        ]
        number = (lambda v: f"{v:.0f}") if step == 1.0 else (lambda v: f"{v:.3g}")
        center = self._slider(
            say("center", language),
            "center",
            shown.center,
            min(ends),
            max(ends),
            step,
            shown=number,
            changed=by_hand,
        )
        widest = max(span, *(w.width for w in PRESETS.values())) if study.hounsfield else span
        width = self._slider(
            say("width", language),
            "width",
            shown.width,
            step,
            widest,
            step,
            shown=number,
            changed=by_hand,
        )

    def _slider(
        self,
        label: str,
        name: str,
        value: float,
        low: float,
        high: float,
        step: float,
        *,
        shown: Callable[[float], str],
        changed: Callable[[float], None],
    ) -> ui.slider:
        with ui.element("div").classes("slider"):
            ui.label(label)
            slider = ui.slider(min=low, max=high, step=step, value=value)
            text = ui.label(shown(value)).classes("number")

        def moved(event: events.ValueChangeEventArguments) -> None:
            text.text = shown(event.value)
            changed(event.value)

        slider.on_value_change(moved)
        slider.props["aria-label"] = label
        return named(slider, name)

    # --- what is done with them ---

    def _show(self, one: Attached, **changes: Any) -> None:
        one.turn_to(replace(one.view, **changes))
        self.told_sent()
        self._wanted = one.view
        if not self._rendering:
            self._rendering = True
            with self._viewer:
                ui.timer(0, lambda: self._render(one), once=True)

    async def _render(self, one: Attached) -> None:
        """Renders the newest view in a thread; views that came in between are left out."""
        try:
            while self._wanted is not None:
                view, self._wanted = self._wanted, None
                url = await asyncio.to_thread(lambda: data_url(one.study.render(view)))  # noqa: B023
                if self.session.chosen == one.number and not self.session.closed:
                    self._picture.props["src"] = url
                    self._picture.update()
        finally:
            self._rendering = False

    def _turn_axis(self, one: Attached, axis: Axis) -> None:
        one.turn_to(replace(one.view, axis=axis, index=one.study.length(axis) // 2))
        self.draw_images()

    def _set_send(self, one: Attached, send: bool) -> None:
        one.send = send
        self.told_sent()

    def _choose(self, number: int) -> None:
        self.session.chosen = number
        self.draw_images()

    def _remove(self, number: int) -> None:
        self.memory.give_back(self.session.remove(number).study.nbytes)
        self.draw_images()

    async def _example(self, example: Example) -> None:
        await self._open([(example.name[self.session.language], example.path)])

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
        errors: list[tuple[str, PageError]] = []
        try:
            async with self.opening:
                opened = await asyncio.to_thread(open_files, files, self.session.limits)
        except (
            Exception
        ):  # a kind of damage that nobody has met yet is no reason to show a traceback
            _LOG.exception("an upload could not be opened")
            self.notices.say([("", PageError("damaged"))])
            return
        if self.session.closed:
            return
        for one in opened or ():
            if isinstance(one.study, PageError):
                errors.append((one.name, one.study))
                continue
            try:
                self.memory.take(one.study.nbytes)
                try:
                    self.session.attach(one.study)
                except PageError:
                    self.memory.give_back(one.study.nbytes)
                    raise
            except PageError as error:
                errors.append((one.name, error))
        self.notices.say(errors)
        self.draw_images()

    def _too_large(self) -> None:
        limit = self.session.limits.upload_bytes / MEBIBYTE
        self.notices.say([("", PageError("upload_too_large", limit=f"{limit:g}"))])

    def _failed(self) -> None:
        self.notices.say([("", PageError("upload_failed"))])
