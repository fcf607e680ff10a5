"""A widget: a real generation, token by token, with everything that steers it."""

import html
import threading
from collections.abc import Callable, Iterator

import ipywidgets
import torch
from torch import Tensor

from mar_mini import load_pretrained, masking
from mar_mini.checkpoints import ImageFrame, Pipeline
from mar_mini.sampling import CFG_SCHEDULES
from mar_mini.viz.canvas import STYLE, WIDE, Panel, TokenCanvas, slider


class Generation:
    """One generation at a time in a thread of its own, so that the kernel goes on listening."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, frames: Iterator, on_frame: Callable, on_end: Callable[[str], None]) -> None:
        """Run through `frames`, each handed to `on_frame`; ends the generation before it.

        on_end  gets "", or why it ended early
        """
        self.stop()
        self._stopped = stopped = threading.Event()

        def run():
            reason = ""
            try:
                for frame in frames:
                    if stopped.is_set():
                        reason = "stopped"
                        break
                    on_frame(frame)
            except Exception as error:  # whatever it is, it belongs into the widget
                reason = str(error) or type(error).__name__
            on_end(reason)

        self._thread = threading.Thread(target=run, daemon=True, name="generation")
        self._thread.start()

    def stop(self) -> None:
        """End it, within one step, and wait until it has ended."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


class GenerationTheatre(Panel):
    """Watch a trained model generate; its canvas fills token by token.

    pipeline  a `Pipeline`, or the name of a trained model
    label     class to begin with
    seed      of the generation: the order and all noise
    order     a name of `masking.ORDERS`, a function like those, or int64 (1, L)

    `Generate` starts; `.frames` are those so far, `.code` is the line that repeats them. Raises
    ValueError for arguments that do not fit; later input that does not is answered in the widget.
    """

    label = "Generation"
    _generation: "Generation | None" = None  # until there is one: `close` is called in any case

    def __init__(
        self,
        pipeline: Pipeline | str = "cifar10",
        label: int = 0,
        *,
        seed: int = 0,
        order: str | masking.Order | Tensor = "random",
    ):
        self.name = f'load_pretrained("{pipeline}")' if isinstance(pipeline, str) else "pipeline"
        self.pipeline = load_pretrained(pipeline) if isinstance(pipeline, str) else pipeline
        self.frames: list[ImageFrame] = []
        self.code = ""
        self._generation = Generation()
        mar, defaults = self.pipeline.mar, self.pipeline.defaults
        if not 0 <= label < len(self.pipeline.classes):
            raise ValueError(f"label is {label}; expected 0 to {len(self.pipeline.classes) - 1}")
        self.orders: dict[str, tuple[str | masking.Order | Tensor, str]] = {
            name: (name, f'"{name}"') for name in masking.ORDERS
        }
        if not isinstance(order, str):
            is_tensor = isinstance(order, Tensor)
            name = "tensor" if is_tensor else getattr(order, "__name__", "function")
            code = f"torch.tensor({order.tolist()})" if is_tensor else name
            masking.check_order(
                order if is_tensor else masking.make_order(order, mar.seq_h, mar.seq_w, 1),
                mar.seq_h,
                mar.seq_w,
                1,
            )
            self.orders[f"{name} (yours)"], order = (order, code), f"{name} (yours)"
        elif order not in self.orders:
            masking.make_order(order, mar.seq_h, mar.seq_w, 1)  # says which there are
        dropdown = {"style": STYLE, "layout": WIDE}
        self._label = ipywidgets.Dropdown(
            options=[(name, i) for i, name in enumerate(self.pipeline.classes)],
            value=label,
            description="class",
            **dropdown,
        )
        self._cfg = slider("cfg (guidance)", defaults.cfg, 1.0, 8.0, 0.25)
        self._cfg_schedule = ipywidgets.Dropdown(
            options=list(CFG_SCHEDULES),
            value=defaults.cfg_schedule,
            description="cfg_schedule",
            **dropdown,
        )
        self._temperature = slider("temperature", defaults.temperature, 0.0, 1.5, 0.05)
        num_iter = min(defaults.num_iter, mar.seq_len)
        self._num_iter = slider("num_iter (steps)", num_iter, 1, mar.seq_len)
        self._sampling_steps = slider("diffusion steps", defaults.num_sampling_steps, 2, 250)
        self._order = ipywidgets.Dropdown(
            options=list(self.orders), value=order, description="order", **dropdown
        )
        self._seed = ipywidgets.BoundedIntText(
            seed, 0, 2**31 - 1, description="seed", style=STYLE, layout=WIDE
        )
        self._start = ipywidgets.Button(
            description="Generate", button_style="primary", tooltip="Generate with these settings"
        )
        self._stop = ipywidgets.Button(
            description="Stop", disabled=True, tooltip="Stop after the step under way"
        )
        self._progress = ipywidgets.IntProgress(0, 0, num_iter, description="step 0", layout=WIDE)
        self._code = ipywidgets.HTML()
        self._start.on_click(lambda _: self.start())
        self._stop.on_click(lambda _: self._generation.stop())
        super().__init__(
            TokenCanvas(rows=mar.seq_h, columns=mar.seq_w, label=self.label), self._controls()
        )
        self._blank()

    def _controls(self) -> list[ipywidgets.Widget]:
        return [
            self._label,
            self._cfg,
            self._cfg_schedule,
            self._temperature,
            self._num_iter,
            self._sampling_steps,
            self._order,
            self._seed,
            ipywidgets.HBox([self._start, self._stop]),
            self._progress,
            self._code,
        ]

    def settings(self) -> dict:
        """What the controls say, as arguments of `Pipeline.sample`; its generator is not in it."""
        return {
            "num_iter": self._num_iter.value,
            "num_sampling_steps": self._sampling_steps.value,
            "cfg": self._cfg.value,
            "cfg_schedule": self._cfg_schedule.value,
            "temperature": self._temperature.value,
            "order": self.orders[self._order.value][0],
        }

    def start(self) -> None:
        """Begin a generation with the settings of the controls; one under way ends first."""
        with self.complaints():
            self._generation.stop()
            settings, seed, label = self.settings(), self._seed.value, self._label.value
            self.code = self._line(settings, seed, label)
            self._begin(label, settings, seed)

    def run(self) -> "GenerationTheatre":
        """Generate, wait until it is done, and return the widget, to be displayed."""
        self.start()
        self._generation.wait()
        return self

    def stop(self) -> None:
        """End the generation under way, within one step."""
        self._generation.stop()

    def close(self) -> None:
        """Remove the widget from every page; ends its generation."""
        if self._generation is not None:
            self._generation.stop()
        super().close()

    def _line(self, settings: dict, seed: int, label: int) -> str:
        code = {
            **settings,
            "cfg_schedule": f'"{settings["cfg_schedule"]}"',
            "order": self.orders[self._order.value][1],
            "generator": f"torch.Generator().manual_seed({seed})",
        }
        arguments = ", ".join(f"{name}={value}" for name, value in code.items())
        return f"{self.name}.generate([{label}], {arguments})"

    def _blank(self, known: list[bool] | None = None, steps: int | None = None) -> None:
        """The canvas before the first step; `known` places are there already."""
        steps, length = steps or self._num_iter.value, self.pipeline.mar.seq_len
        self.frames = []
        with self.canvas.hold_sync():
            self.canvas.turns = [-1 if k else steps for k in known or [False] * length]
            self.canvas.step, self.canvas.steps = 0, steps
        self._progress.max = steps
        self._show_progress(0)

    def _begin(self, label: int, settings: dict, seed: int, **known) -> None:
        """Start the thread; `known` are further arguments of `Pipeline.sample`."""
        generator = torch.Generator().manual_seed(seed)
        frames = self.pipeline.sample([label], generator=generator, **settings, **known)
        self._blank(known["known"][0].tolist() if known else None, settings["num_iter"])
        self.canvas.clear_pictures()
        self._code.value = f"<code style='overflow-wrap:anywhere'>{html.escape(self.code)}</code>"
        self._start.disabled, self._stop.disabled = True, False
        self._generation.start(frames, self._on_frame, self._on_end)

    def picture(self, frame: ImageFrame) -> Tensor:
        """What the canvas shows of a frame, (C, H, W) in [0, 1]."""
        return frame.images()[0]

    def _on_frame(self, frame: ImageFrame) -> None:
        self.frames.append(frame)
        turns = self.canvas.turns
        predicted = frame.predicted[0].tolist()
        self.canvas.show_picture(self.picture(frame), frame.step + 1)
        self.canvas.turns = [
            frame.step if new else old for new, old in zip(predicted, turns, strict=True)
        ]
        if self.canvas.step == frame.step:  # nobody has gone back in time meanwhile
            self.canvas.step = frame.step + 1
        self._show_progress(frame.step + 1)

    def _show_progress(self, step: int) -> None:
        self._progress.value, self._progress.description = step, f"step {step}"

    def _on_end(self, reason: str) -> None:
        if reason == "stopped":
            reason = f"stopped after step {len(self.frames)} of {self.canvas.steps}"
        self.canvas.message = reason
        self._start.disabled, self._stop.disabled = False, True
