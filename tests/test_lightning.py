"""examples/lightning_module.py trains, and saves the memory of the loss."""

import pytest
import torch


def test_lightning_trains_and_saves_the_memory_of_the_loss(tmp_path):
    pytest.importorskip("pytorch_lightning", reason="pip install '.[lightning]'")
    import lightning_module

    before, after, trainer = lightning_module.main(
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    assert after["MAP@R"] > before["MAP@R"] + 0.1
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = lightning_module.Retrieval.load_from_checkpoint(tmp_path / "saved.ckpt")
    memory = trainer.lightning_module.loss_func
    assert torch.equal(loaded.loss_func.embedding_memory, memory.embedding_memory.cpu())
    assert loaded.loss_func.queue_idx == memory.queue_idx
    assert loaded.loss_func.has_been_filled
