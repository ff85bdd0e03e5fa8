"""The steps of `bench timeline` as a picture: a lane of the host over one of the device, whole and in detail."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from qwen_rt.runtime.cuda.bench import StepTimes

__all__ = ["draw_timeline"]

_WIDTH = 1160
_LEFT, _RIGHT = 80, 1130
_LANE = 34
_LEAST_WIDTH = 1.0  # px: what is shorter stays visible
_CHAR = 6.8  # px: a character of 11 px text is not wider on average
_COLORS = {
    "launch": ("#d9822b", "host launches a step"),
    "read": ("#7a4fa3", "host reads its tokens"),
    "wait": ("#e4e9ec", "host waits"),
    "device": ("#2f8f9d", "device computes"),
    "idle": ("#c0392b", "device idle"),
}


@dataclass(frozen=True)
class _Box:
    """What happened from `start_us` to `end_us`; `label` is written into the box where it fits."""

    kind: str
    number: int
    start_us: float
    end_us: float
    label: str = ""

    @property
    def us(self) -> float:
        return self.end_us - self.start_us

    @property
    def lane(self) -> str:
        return "device" if self.kind in ("device", "idle") else "host"

    @property
    def title(self) -> str:
        words = {"launch": "launch of step", "read": "reading step", "wait": "wait for step", "device": "step"}
        return f"{words.get(self.kind, 'idle after step')} {self.number}: {self.us:.1f} µs"


def _boxes(times: Sequence[StepTimes], idle_us: Sequence[float]) -> list[_Box]:
    """Return all boxes, numbers from 1, what is drawn later on top."""
    found = []
    for number, step in enumerate(times, 1):
        busy_us = step.device_end_us - step.device_start_us
        label = f"step {number}, {busy_us:.0f} µs"
        found.append(_Box("wait", number, step.wait_start_us, step.read_start_us))
        found.append(_Box("device", number, step.device_start_us, step.device_end_us, label))
        found.append(_Box("launch", number, step.launch_start_us, step.launch_end_us))
        found.append(_Box("read", number, step.read_start_us, step.read_end_us))
    for number, (step, gap_us) in enumerate(zip(times, idle_us, strict=False), 1):
        found.append(_Box("idle", number, step.device_end_us, step.device_end_us + gap_us))
    return found


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _tick_us(span_us: float, most: int = 11) -> float:
    """Return the distance of ticks: 1, 2 or 5 times a power of ten, at most `most` of them in `span_us`."""
    power = 10.0 ** math.floor(math.log10(span_us / most))
    return next(power * factor for factor in (1, 2, 5, 10) if span_us / (power * factor) <= most)


@dataclass(frozen=True)
class _Panel:
    """Both lanes from `start_us` to `end_us`, with an axis whose zero is at `zero_us`.

    Attributes:
        top: y of its heading.
        heading: What it shows.
        zero: What its zero is.
    """

    top: float
    heading: str
    start_us: float
    end_us: float
    zero_us: float
    zero: str

    def x(self, at_us: float) -> float:
        """Return the place of a time, inside the panel."""
        share = (at_us - self.start_us) / (self.end_us - self.start_us)
        return _LEFT + min(1.0, max(0.0, share)) * (_RIGHT - _LEFT)

    def y(self, lane: str) -> float:
        """Return the upper edge of a lane."""
        return self.top + 12 + (0 if lane == "host" else _LANE + 8)

    @property
    def axis(self) -> float:
        """The y of the axis."""
        return self.y("device") + _LANE + 8

    def draw(self, boxes: Sequence[_Box]) -> Iterator[str]:
        """Yield the elements."""
        yield _text(_LEFT, self.top, self.heading, more=' class="heading"')
        for lane in ("host", "device"):
            yield _text(_LEFT - 10, self.y(lane) + _LANE / 2 + 4, lane, "end")
        for box in boxes:
            if box.end_us >= self.start_us and box.start_us <= self.end_us and (box.kind != "idle" or box.us > 0):
                yield from self._draw_box(box)
        tick_us = _tick_us(self.end_us - self.start_us)
        yield f'<path d="M{_LEFT} {self.axis:.1f}H{_RIGHT}" stroke="#5a6468"/>'
        first = math.ceil((self.start_us - self.zero_us) / tick_us)
        last = math.floor((self.end_us - self.zero_us) / tick_us)
        for index in range(first, last + 1):
            x = self.x(self.zero_us + index * tick_us)
            yield f'<path d="M{x:.1f} {self.axis:.1f}v5" stroke="#5a6468"/>'
            yield _text(x, self.axis + 18, f"{index * tick_us:g}", "middle")
        yield _text((_LEFT + _RIGHT) / 2, self.axis + 34, f"µs since {self.zero}", "middle")

    def _draw_box(self, box: _Box) -> Iterator[str]:
        left, right = self.x(box.start_us), self.x(box.end_us)
        width = max(_LEAST_WIDTH, right - left)
        y = self.y(box.lane)
        yield (
            f'<rect class="{box.kind}" x="{left:.2f}" y="{y:.1f}" width="{width:.2f}" height="{_LANE}" '
            f'fill="{_COLORS[box.kind][0]}"><title>{escape(box.title)}</title></rect>'
        )
        label = next((text for text in (box.label, str(box.number)) if len(text) * _CHAR + 6 <= width), "")
        if box.label and label:
            yield _text(left + width / 2, y + _LANE / 2 + 4, label, "middle", ' fill="#fff"')


def _callouts(panel: _Panel, notes: Sequence[tuple[float, str, str]]) -> Iterator[str]:
    """Yield texts under a panel, each with a line up to what it is about.

    Args:
        panel: In which the lines end.
        notes: Time, lane and text of each, left to right.
    """
    for index, (at_us, lane, text) in enumerate(notes):
        # The rightmost text is the uppermost, so that no line crosses a text.
        x, y = panel.x(at_us), panel.axis + 60 + 18 * (len(notes) - 1 - index)
        yield f'<path d="M{x:.1f} {panel.y(lane) + _LANE:.1f}V{y - 4:.1f}" stroke="#5a6468" stroke-dasharray="2 2"/>'
        fits = x + 6 + len(text) * _CHAR <= _WIDTH
        yield _text(x + 6 if fits else x - 6, y, text, "start" if fits else "end")


def _legend(y: float) -> Iterator[str]:
    x = float(_LEFT)
    for color, text in _COLORS.values():
        yield f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" fill="{color}"/>'
        yield _text(x + 18, y, text)
        x += 32 + len(text) * _CHAR
    yield _text(x, y, "blank: loop and events; a box is 1 px at least")


def draw_timeline(times: Sequence[StepTimes], idle_us: Sequence[float], clock_us: float, title: str) -> str:
    """Draw the steps, and the surroundings of the longest gap between two of them.

    Args:
        times: Of the steps that are told, and of two more.
        idle_us: Device time without work after each of those that are told.
        clock_us: What host and device times may be apart by, to either side.
        title: Model, rows, prompt, GPU.

    Returns:
        An SVG document that needs nothing else.
    """
    boxes = _boxes(times, idle_us)
    count = len(idle_us)
    first_us = times[0].device_start_us
    last_us = max(times[count].device_start_us, times[count - 1].read_end_us, times[count + 1].launch_end_us)
    is_late = any(step.device_end_us < after.launch_end_us for step, after in pairwise(times[: count + 1]))
    said = "some are launched too late" if is_late else "each is launched before the device is done with the one before"
    zero = "the first step's start on the device"
    whole = _Panel(76, f"{count} steps: {said}", first_us, last_us, first_us, zero)

    worst = max(range(count), key=lambda index: idle_us[index])
    step, following, launched = times[worst], times[worst + 1], times[worst + 2]
    end_us = step.device_end_us
    span_us = max(launched.launch_end_us - end_us, idle_us[worst], 1.0)
    detail = _Panel(
        whole.axis + 86,
        f"between steps {worst + 1} and {worst + 2}, the longest gap",
        end_us - 0.3 * span_us,
        end_us + 1.6 * span_us,
        end_us,
        f"the end of step {worst + 1} on the device",
    )
    lead_us = following.device_end_us - launched.launch_end_us
    when = f"{lead_us:.1f} µs before its turn" if lead_us >= 0 else f"{-lead_us:.1f} µs too late"
    launch_us, read_us = launched.launch_end_us - launched.launch_start_us, step.read_end_us - step.read_start_us
    notes = [
        (end_us + idle_us[worst] / 2, "device", f"device idle: {idle_us[worst]:.1f} µs"),
        (
            step.read_start_us,
            "host",
            f"host awake {step.read_start_us - end_us:.1f} µs after the end of step {worst + 1}",
        ),
        (
            (step.read_start_us + step.read_end_us) / 2,
            "host",
            f"reading the tokens of step {worst + 1}: {read_us:.1f} µs",
        ),
        (
            (launched.launch_start_us + launched.launch_end_us) / 2,
            "host",
            f"launch of step {worst + 3}: {launch_us:.1f} µs, done {when}",
        ),
    ]
    notes.sort(key=lambda note: note[0])
    legend_y = detail.axis + 60 + 18 * len(notes) + 16
    height = legend_y + 20
    clocks = f"one step is launched ahead; host and device times agree within ±{clock_us:.1f} µs"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" font-size="11" fill="#24292e">',
        f"<title>{escape(title)}</title>",
        "<style>.title{font-size:16px;font-weight:bold}.heading{font-size:12px;font-weight:bold}</style>",
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        _text(_LEFT, 28, f"Decode steps: {title}", more=' class="title"'),
        _text(_LEFT, 48, clocks),
        *whole.draw(boxes),
        *detail.draw(boxes),
        *_callouts(detail, notes),
        *_legend(legend_y),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"
