"""The chat command: ``vlmlab chat run=...`` talks to a finished run in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from vlmlab.cli.conf import conf_folder
from vlmlab.cli.entry import guard, run_command
from vlmlab.cli.finished import check_own
from vlmlab.cli.generate import images_of, opened, settings_of
from vlmlab.cli.rules.schema import Sampling
from vlmlab.contracts.errors import UserError
from vlmlab.contracts.terminal import tell

if TYPE_CHECKING:
    from vlmlab.loading import LoadedModel

EXAMPLE = "vlmlab chat run=outputs/default image=photo.jpg"
HELP = "/image <file>: a new conversation about that image   /new: about the same   /quit"


def chat_command(cfg: DictConfig) -> None:
    """Read lines until ``/quit`` or the end of the input, and answer each.

    Raises:
        ConfigError: ``run`` is missing or no folder of a run.
        CheckpointError: the run is not finished, or its files do not fit.
    """
    check_own(cfg, Sampling)
    talk = Conversation(opened(cfg, EXAMPLE), images_of(cfg), settings_of(cfg))
    tell(HELP)
    while (line := _line()) is not None and line != "/quit":
        try:
            talk.take(line)
        except UserError as error:  # the conversation goes on
            tell(f"error: {error}", sys.stderr)


def _line() -> str | None:
    """What is typed, without spaces around; None at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


@dataclass
class Conversation:
    """Questions and answers so far about one set of images.

    Attributes:
        model: what answers.
        images: files; None: no image.
        settings: of every answer.
        history: (question, answer) of the turns so far.
    """

    model: LoadedModel
    images: list[str] | None
    settings: dict[str, Any]
    history: list[tuple[str, str]] = field(default_factory=list)

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a question whose answer is written as it is made.

        Raises:
            UserError: an unknown command, or a question or image that is not possible; nothing has changed then.
        """
        command, _, rest = line.partition(" ")
        if command == "/new":
            self.history.clear()
        elif command == "/image":
            self._look_at(rest.strip())
        elif command.startswith("/"):
            raise UserError(f"{command} is not a command here; {HELP}.")
        elif line:
            self._answer(line)

    def _look_at(self, file: str) -> None:
        if not file:
            raise UserError("/image needs a file, as in: /image photo.jpg.")
        self.model.check_image(file)
        self.images = [file]
        self.history.clear()

    def _answer(self, question: str) -> None:
        stream = None if (self.settings.get("num_beams") or 1) > 1 else _write
        answer = self.model.generate(self.images, question, history=self.history, stream=stream, **self.settings)
        tell("" if stream is not None else answer)
        self.history.append((question, answer))


def _write(piece: str) -> None:
    tell(piece, end="")


if __name__ == "__main__":
    conf = conf_folder()
    main = hydra.main(config_path=str(conf), config_name="chat", version_base="1.3")(guard(chat_command))
    sys.exit(run_command(main, conf, "chat"))
