"""``SllmModelLoader``: the class behind ``--load-format sllm``. vLLM makes one instance per worker and load."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from sllm_vllm.checkpoint.reader import Checkpoint
from sllm_vllm.checkpoint.repository import CheckpointKey, CheckpointRepository
from sllm_vllm.config import LoaderConfig
from sllm_vllm.errors import CheckpointCorrupt, CheckpointError, ConfigError, LayoutMismatch, WriteError
from sllm_vllm.loader.load import RunningLoad, device_of, start_load
from sllm_vllm.loader.module_state import TransientBuffers, named_state
from sllm_vllm.loader.read import read_tensors
from sllm_vllm.loader.report import LoadReport
from sllm_vllm.loader.save import save_state_behind
from sllm_vllm.loader.vllm.catalog import Catalog, Found
from sllm_vllm.loader.vllm.layout import rank_position
from sllm_vllm.loader.vllm.post_processing import process_while_loading
from sllm_vllm.loader.vllm.reload import config_of, reload_layers_once, remember_config
from sllm_vllm.loader.vllm.source import ModelSource, require_weights_here

logger = init_logger(f"vllm.{__name__}")


@register_model_loader("sllm")
class SllmModelLoader(BaseModelLoader):
    """Loads from our checkpoint if there is one, else the stock way, and then writes a checkpoint.

    The constructor only validates its arguments, because on CUDA vLLM builds a loader twice. ``report`` is the report
    of the last load.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.config = LoaderConfig.from_extra_config(load_config.model_loader_extra_config)
        self.report = LoadReport(outcome="unconverted")
        stock_config = dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
        self._stock = DefaultModelLoader(stock_config)
        self._catalog = Catalog(self.config)
        self._found: Found | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the source weights, as the stock loader does."""
        self._stock.download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Build the module, fill it and post-process it.

        Raises:
            CheckpointCorrupt: bytes of the checkpoint differ from their checksums; it was set aside.
            CheckpointError: the model consists of a checkpoint only, and it can't be used.
        """
        start = time.perf_counter()
        self.report = LoadReport(rank=rank_position(vllm_config).rank, outcome="unconverted")
        self._found = self._catalog.find(vllm_config, model_config, prefix)
        if self._found.checkpoint is None:
            model = super().load_model(vllm_config, model_config, prefix)
        else:
            with _collecting_only_new_garbage(), self._source_verified(self._found):
                model = self._load_checkpoint(self._found, vllm_config, model_config, prefix=prefix)
        self._found = None
        remember_config(model, vllm_config)
        self.report.total_s = time.perf_counter() - start
        self._tell()
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill an existing module, without post-processing it.

        Raises:
            CheckpointError: see ``load_model``.
        """
        vllm_config = get_current_vllm_config()
        found = self._found or self._catalog.find(vllm_config, model_config)
        self.report.rank = rank_position(vllm_config).rank
        with self._source_verified(found), contextlib.ExitStack() as stack:
            if self._bind(self._start(found, device_of(model), stack), found, model) is not None:
                return
        self._load_stock(found if found.checkpoint is None else None, model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        """Weights for vLLM's ``reload_weights``: our checkpoint's, by names in the module, or else Hugging Face's.

        Raises:
            CheckpointError: the model consists of a checkpoint only, and it can't be used.
        """
        vllm_config = config_of(model)
        found = self._catalog.find(vllm_config, model_config)
        checkpoint = found.checkpoint
        if checkpoint is None:
            logger.info("event=reload format=stock model=%s", model_config.model)
            return self._stock.get_all_weights(model_config, model)
        if found.source is not None and self.config.verify_source == "always":
            found.source.start_reading(afresh=True)
            found.source.require(checkpoint)  # before the first tensor: a reload can't be undone
        logger.info("event=reload format=sllm checkpoint=%s", checkpoint.path)
        reload_layers_once(model)
        return read_tensors(checkpoint.partition(rank_position(vllm_config).rank), self.config)

    def _load_checkpoint(
        self, found: Found, vllm_config: VllmConfig, model_config: ModelConfig, *, prefix: str
    ) -> nn.Module:
        assert found.checkpoint is not None
        start = time.perf_counter()
        device = torch.device(self.load_config.device or vllm_config.device_config.device)
        with set_default_torch_dtype(model_config.dtype):
            with contextlib.ExitStack() as stack:
                load = self._start(found, device, stack)
                with device:
                    model = self._create(vllm_config, model_config, prefix)
                self.report.construct_s = time.perf_counter() - start
                load = self._bind(load, found, model)
                if load is not None:
                    self.report.process_s = process_while_loading(load, model, model_config, device=device)
            if load is None:
                self._load_stock(None, model, model_config)
                process_weights_after_loading(model, model_config, device)
        return model.eval()

    def _create(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> nn.Module:
        create = getattr(super(), "create_model", None)  # from vLLM 0.30 on
        if create is not None:
            return create(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        return initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)

    def _start(self, found: Found, device: torch.device, stack: contextlib.ExitStack) -> RunningLoad | None:
        """Begin to read ``found``'s checkpoint; closing ``stack`` ends the load. None if the stock loader has to load.

        Errors before anything was filled (a broken header, a missing file) are logged, and the stock loader is used,
        unless the model consists of the checkpoint only.
        """
        if found.checkpoint is None:
            return None
        partition = found.checkpoint.partition(self.report.rank)
        self.report.outcome, self.report.checkpoint = "loaded", str(found.checkpoint.path)
        try:
            stack.enter_context(self._corruption_set_aside(found.checkpoint))
            return stack.enter_context(start_load(partition, self.config, device=device, report=self.report))
        except CheckpointError as error:
            self._go_stock(found, error)
            return None

    def _bind(self, load: RunningLoad | None, found: Found, model: nn.Module) -> RunningLoad | None:
        """Bind the load to the module it fills; None if they don't match, so that the stock loader has to load."""
        try:
            if load is not None:
                load.bind(model)
            return load
        except LayoutMismatch as error:
            self._go_stock(found, error)
            return None

    def _go_stock(self, found: Found, error: CheckpointError) -> None:
        self.report.outcome = "unconverted"
        if found.is_model_itself:
            raise error
        if isinstance(error, CheckpointCorrupt) and found.checkpoint is not None:
            self._catalog.set_aside(found.checkpoint)
        logger.warning("event=checkpoint_unused reason=%s", error)

    @contextlib.contextmanager
    def _corruption_set_aside(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Set the checkpoint aside if the load finds it to be corrupt, so that the next start converts again."""
        try:
            yield
        except CheckpointCorrupt as error:
            if not self._catalog.set_aside(checkpoint):
                raise
            mend = "it was set aside, the next start converts again"
            raise CheckpointCorrupt(error.path, error.problem, mend, tensors=error.tensors) from None

    def _load_stock(self, found: Found | None, model: nn.Module, model_config: ModelConfig) -> None:
        """Load the stock way, then write a checkpoint; a failure to write it never fails the start."""
        source, transient = self._source_to_convert(found), None
        if source is not None:
            source.start_reading(afresh=self.config.verify_source == "always")
            transient = TransientBuffers(model)
        start = time.perf_counter()
        self._stock.load_weights(model, model_config)
        self.report.weights_s = time.perf_counter() - start
        if found is None or source is None or transient is None:
            return
        try:
            require_weights_here(model, model_config)
            self._write_through(found, source, {**named_state(model), **transient.changed()})
        except (ConfigError, WriteError) as error:
            logger.warning("event=not_converted reason=%s", error)

    def _source_to_convert(self, found: Found | None) -> ModelSource | None:
        """The source to identify during the load, because a checkpoint will be written; None if none will be."""
        if found is None or found.source is None or not self.config.write_through:
            return None
        try:
            CheckpointRepository(self.config.store_dir).require_writable()
        except WriteError as error:
            logger.warning("event=not_converted reason=%s", error)
            return None
        return found.source

    def _write_through(self, found: Found, source: ModelSource, state: Mapping[str, torch.Tensor]) -> None:
        assert found.layout is not None
        key = CheckpointKey(source.finish_reading(), found.layout)
        staging = CheckpointRepository(self.config.store_dir).stage(key, self.config.chunk_bytes)
        rank = self.report.rank
        save_state_behind(staging, rank, state, is_sound=lambda: source.has_content_of_names(key.source))
        self.report.outcome, self.report.checkpoint = "converted", str(staging.target)

    @contextlib.contextmanager
    def _source_verified(self, found: Found) -> Iterator[None]:
        """With ``verify_source: always``, read the source weights during the load and check that they are unchanged.

        Raises:
            SourceChanged: the checkpoint was made from other weights.
        """
        if self.config.verify_source != "always" or found.source is None or found.checkpoint is None:
            yield
            return
        found.source.start_reading(afresh=True)
        yield
        if self.report.outcome == "loaded":
            found.source.require(found.checkpoint)

    def _tell(self) -> None:
        logger.info("event=load_model %s", self.report.line())
        if self.config.report_path is not None:
            try:
                self.report.write(Path(self.config.report_path))
            except OSError as error:
                logger.warning("event=report_not_written path=%s reason=%s", self.config.report_path, error)


@contextlib.contextmanager
def _collecting_only_new_garbage() -> Iterator[None]:
    """Collect the load's garbage without traversing the 700,000 objects that imports created (0.4 s per collection)."""
    frozen_before = gc.get_freeze_count() > 0  # a warm parent has frozen them; leave that as it is
    if not frozen_before:
        gc.freeze()
    try:
        yield
        gc.collect()
        torch.accelerator.empty_cache()
    finally:
        if not frozen_before:
            gc.unfreeze()
