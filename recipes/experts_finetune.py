"""Fine-tune an expert of one base on each of several texts, and search the mixture of them that a target likes best.

accelerate launch --config_file launcher/accelerate/cpu.yaml --deepspeed_config_file recipes/experts.json \
    recipes/experts_finetune.py --dataset code.txt law.txt --target mixed.txt

Each particle trains on a text of its own, and they never sync. Then their weights are combined, with one coefficient
for each particle and layer, so that the held-out loss on the target is lowest. With --lora only adapters are trained
and combined.
"""

import argparse
import sys
from collections.abc import Callable

import _common as recipe
import _smoke_data as smoke
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_pso
from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm
from ds_pso.training.model import causal_loss, from_pretrained
from ds_pso.training.start import run
from ds_pso.training.text import Blocks, load_corpus


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = recipe.make_parser(
        "experts_finetune", "Fine-tune experts, and search a mixture of them.", steps=300, batch_size=4, lr=1e-4
    )
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M", help="the base: local folder or hub id (default: %(default)s)")
    add("--dataset", nargs="+", default=[], help="a text file, a folder of them or a datasets id for each particle")
    add("--target", help="the text whose held-out loss the mixture shall have lowest")
    add("--seq_length", type=int, default=512, help="tokens of a packed sequence (default: %(default)s)")
    add("--samples", type=int, default=200, help="sequences of the target that score a mixture (default: %(default)s)")
    add("--evaluations", type=int, default=200, help="mixtures that are scored, at most (default: %(default)s)")
    add("--searcher", default="pso", help="how the next one is chosen: see docs/experts.md (default: %(default)s)")
    add("--lora", action="store_true", help="train low-rank adapters of all linear layers, and nothing else")
    return recipe.parse(parser, argv, steps=40, batch_size=8, lr=5e-3, seq_length=32, samples=64, evaluations=40)


def loss_on(swarm: Swarm, engine: torch.nn.Module, blocks: Blocks, samples: range) -> Callable[[], float]:
    """Return a score: the loss of the model as it is, on this rank's part of the samples."""
    layout = swarm.world.layout
    mine = samples[layout.rank :: layout.world_size][: len(samples) // layout.world_size]

    def score() -> float:
        batch = torch.stack([blocks[i] for i in mine])
        return float(causal_loss(engine, batch.to(engine.device)))

    return score


def train(arguments: argparse.Namespace) -> None:
    with ds_pso.init(run_dir=arguments.output_dir) as swarm:
        # Accelerate would ask a loader, and the data of one particle is none that the swarm shards.
        swarm.ds_config["train_micro_batch_size_per_gpu"] = recipe.batch_size(swarm, arguments)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=swarm.ds_config))
        recipe.begin(swarm, arguments)
        base, texts, target = arguments.model, arguments.dataset, arguments.target
        if arguments.smoke:  # the target has the language of no expert alone: half of its text is that of each
            base = recipe.make_once(swarm, arguments.output_dir / "base", smoke.make_llama)
            made = arguments.output_dir / "made"
            texts = [
                recipe.make_once(swarm, made / str(i), lambda path, i=i: smoke.make_text(path, language=i + 1))
                for i in range(swarm.num_particles)
            ]
            target = recipe.make_once(swarm, made / "target", lambda path: smoke.make_mixture(path, (1, 2)))
        if len(texts) != swarm.num_particles or target is None:
            raise ConfigError(
                f"--dataset: {len(texts)} texts for {swarm.num_particles} particles; give one for each, and a --target"
            )
        with swarm.world.coordinator.agree("loading the model"):
            tokenizer = from_pretrained(AutoTokenizer, base)
            model = from_pretrained(AutoModelForCausalLM, base, dtype=torch.float32)
        names = [*(f"text_{i}" for i in range(len(texts))), "target"]
        corpora = [
            load_corpus(swarm, text, arguments.output_dir / "data" / name, arguments.seq_length, tokenizer)
            for name, text in zip(names, [*texts, target], strict=True)
        ]

        torch.manual_seed(arguments.seed)
        if arguments.lora:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, config)
        engine, *_ = swarm.prepare(accelerator, model, *recipe.stand_ins(swarm, model, arguments))

        layout, mine = swarm.world.layout, corpora[swarm.particle].train
        sampler = DistributedSampler(mine, layout.particle_size, layout.shard_rank)  # over the ranks of this particle
        loader = DataLoader(mine, batch_size=recipe.batch_size(swarm, arguments), sampler=sampler, drop_last=True)
        for batch in recipe.batches(swarm, engine, loader, arguments.steps):
            with accelerator.accumulate(engine):
                accelerator.backward(causal_loss(engine, batch.to(engine.device)))

        held_out, count = corpora[-1].held_out, arguments.samples
        if len(held_out) < 2 * count:
            raise ConfigError(
                f"--samples {count}: the held-out part of {target} has {len(held_out)} sequences, and half are for the "
                "test; use fewer, or more text"
            )
        result = swarm.search(
            loss_on(swarm, engine, held_out, range(count)),
            test=loss_on(swarm, engine, held_out, range(count, 2 * count)),
            searcher=arguments.searcher,
            evaluations=arguments.evaluations,
            seed=arguments.seed,
        )
        swarm.export(arguments.output_dir / "model", tokenizer=tokenizer)
        if swarm.is_leader:
            for name, scored in (("best expert", result.best_single), ("mean of all", result.uniform_soup)):
                print(f"{name} {scored.test:.4f}")
        assert result.winner.test is not None
        recipe.finish(swarm, arguments, "test_loss", result.winner.test)


def main(argv: list[str] | None = None) -> int:
    return run(lambda: train(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
