"""What the cases of `experiments.exp_cpu` share: models, threads, a folder, and the peer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from experiments.cases import CpuCases
from experiments.make_model import write_model
from forge.shard import shard_model
from forge.sharded_model import ShardedModel


@dataclass
class Session:
    """One run of the experiment.

    Attributes
    ----------
    cases
        The parameters.
    folder
        Where models and pages are written; its content is not kept.
    threads
        Threads of every variant that can be told.
    llama_python
        An interpreter that has `llama_cpp`, or None.
    given
        GGUF files to use in place of generated ones.
    seed
        Seed of generated weights.
    """

    cases: CpuCases
    folder: Path
    threads: int
    llama_python: str | None
    given: list[Path] = field(default_factory=list)
    seed: int = 0
    _made: dict[str, Path] = field(default_factory=dict)
    _sharded: dict[Path, Path] = field(default_factory=dict)

    def models(self) -> list[Path]:
        """The GGUF files to decode with; the first one is for everything else, too."""
        return self.given or [self._make(name) for name in self.cases.types]

    def first_model(self) -> Path:
        """The model of the cases that need one only."""
        return self.given[0] if self.given else self._make(self.cases.types[0])

    def sharded(self, model: Path) -> Path:
        """The map of a model, which is sharded when first asked for."""
        if model not in self._sharded:
            folder = self.folder / f"pages-{len(self._sharded)}"
            self._sharded[model] = shard_model(model, folder)
        return self._sharded[model]

    def name(self, model: Path) -> str:
        """What the model calls itself, for rows: file names are nobody's business."""
        with ShardedModel(self.sharded(model)) as opened:
            metadata = opened.source_header().metadata
        return str(metadata.get("general.name", "unnamed model"))

    def _make(self, type_name: str) -> Path:
        if type_name not in self._made:
            path = self.folder / f"{self.cases.model}-{type_name.lower()}.gguf"
            self._made[type_name] = write_model(path, self.cases.model, type_name, seed=self.seed)
        return self._made[type_name]
