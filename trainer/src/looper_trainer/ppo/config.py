"""Settings of `looper ppo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from looper_schemas.scoring import Disclosure, RewardMode
from looper_trainer.sampling.options import SamplerOptions, Share

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Coefficient = Annotated[float, Field(ge=0)]
Discount = Annotated[float, Field(ge=0, le=1)]


# For an 8B model on one GPU; see decision 0064 for the arithmetic.
PRESETS: dict[str, dict[str, Any]] = {
    "80gb": {
        "memory_limit_gb": 80.0,
        "vllm_memory_gb": 38.0,
        "activation_checkpointing": True,
    },
    "40gb": {
        "memory_limit_gb": 40.0,
        "vllm_memory_gb": 34.0,
        "vllm_sleep": True,
        "offload": True,
        "activation_checkpointing": True,
    },
    "24gb": {
        "memory_limit_gb": 24.0,
        "vllm_memory_gb": 10.5,
        "quantize": "nf4",
        "activation_checkpointing": True,
        "micro_batch_tokens": 4096,
        "logit_chunk_tokens": 512,
    },
}


class PPOConfig(SamplerOptions):
    """Train with PPO on the scores of a reward service.

    A step takes `batch_size` questions with `samples_per_question` completions each, and goes over them
    `ppo_epochs` times; an optimizer step takes `mini_batch_size * gradient_accumulation_steps` questions
    with all their completions. Forward passes are cut by tokens, not rows: `micro_batch_tokens` is a limit
    of memory and changes no result. Training samples use the full distribution (top_p is always 1).
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    # What is trained, on what, and where the result goes.
    model: str = "checkpoints/sft"
    """SFT model to start from, also the reference policy: a folder or a hub name"""
    train_file: Path = Path("data/gsm8k_train.jsonl")
    """problems to train on"""
    dev_file: Path | None = Path("data/gsm8k_dev.jsonl")
    """problems for the greedy accuracy that picks the best checkpoint; none to skip it"""
    rollouts_file: Path | None = None
    """scored rollouts: train only on questions solved sometimes, warm the critic up on them"""
    min_pass_rate: Discount = 0.0
    """of rollouts_file: train on questions solved more often than this"""
    max_pass_rate: Discount = 1.0
    """and less often than this"""
    curriculum_steps: Count = 0
    """steps over which questions join, the most often solved of rollouts_file first; 0: all at once"""
    output: Path = Path("checkpoints/ppo_rl")
    """folder of the run and its result"""
    run_id: str | None = None
    """name of the run at the reward service; none: from output and seed"""
    seed: Count = 0
    """of question order, samples and adapter"""
    resume: bool = False
    """go on from the last checkpoint in output"""

    # Sampling.
    vllm_memory_share: Share | None = 0.4
    """share of the GPU's memory that our servers may take; none: vLLM's default"""
    batch_size: Positive = 16
    """questions a step"""
    samples_per_question: Positive = 4
    """completions of each, scored as one group"""
    max_new_tokens: Positive = 256
    """longest completion, in tokens"""
    temperature: Rate = 1.0
    """of sampling; logprobs use the same"""
    sample_batch_size: Positive = 64
    """completions decoded together by the transformers sampler"""
    merged_sampling: bool = False
    """transformers: sample from a second copy of the weights, adapter merged: faster, more memory"""

    overlap: bool = False
    """sample the next step while this one is learnt from: one step off-policy, corrected by the weights"""
    reference_on_sampler: bool = False
    """let vLLM, on other GPUs, give the reference's logprobs too: spares a pass here (decision 0072)"""

    # The reward.
    reward_mode: RewardMode = RewardMode.ARM_GATED
    """how scores become rewards of completions"""
    disclosure: Disclosure = Disclosure.COMPONENTS
    """what to ask of the service; components needs a key with that scope"""
    score_chunk: Positive = 8
    """questions sent to the service together as soon as their completions are in (sampler vllm)"""
    score_connections: Positive = 4
    """such requests at a time"""
    on_unscored: Literal["pause", "drop"] = "pause"
    """when questions stay without a score: pause the run, or drop up to a tenth of a step"""
    give_up_after_s: Rate = 1800.0
    """seconds to wait for the reward service before pausing"""

    # The update.
    train: Literal["lora", "full"] = "lora"
    """an adapter on all linear layers, or every weight (small models; a frozen copy is the reference)"""
    steps: Positive = 200
    """steps in all"""
    mini_batch_size: Positive = 4
    """questions a minibatch"""
    gradient_accumulation_steps: Positive = 1
    """minibatches an optimizer step"""
    ppo_epochs: Positive = 2
    """passes over each step's samples"""
    learning_rate: Rate = 5e-6
    """of the adapter, or of the weights"""
    value_learning_rate: Rate = 1e-4
    """of the value head"""
    warmup_steps: Count = 0
    """steps of linear learning-rate warm-up"""
    decay_steps: Count = 0
    """step at which the rates have fallen, linearly, to decay_to of their value; 0: they stay"""
    decay_to: Discount = 0.1
    """share of the learning rates that is left after decay_steps"""
    weight_decay: Coefficient = 0.0
    """of AdamW"""
    max_grad_norm: Rate = 1.0
    """gradients of adapter and value head are each clipped to this norm"""
    lora_rank: Positive = 16
    """rank of the adapter on all linear layers"""
    lora_alpha: Positive = 32
    """its scale is alpha / rank"""
    lora_rslora: bool = False
    """scale it by alpha / sqrt(rank) instead, for high ranks"""
    gamma: Discount = 1.0
    """discount of a token"""
    lam: Discount = 1.0
    """lambda of generalized advantage estimation"""
    advantages: Literal["gae", "leave_one_out", "group_normalised"] = "gae"
    """from the critic; or the reward less the mean of its question's others; or that over their spread"""
    skip_equal_groups: bool = False
    """learn only from questions whose completions got different rewards (needs advantages from the group)"""
    whiten_advantages: bool = True
    """shift and scale a step's advantages to mean 0 and variance 1"""
    clip_range: Rate = 0.2
    """of the probability ratio"""
    value_clip_range: Rate = 0.2
    """of the change of a value"""
    vf_coef: Coefficient = 0.1
    """weight of the value loss"""
    critic_moves_trunk: bool = True
    """let the value loss change what the policy is made of too, not the value head alone"""
    entropy_coef: Coefficient = 0.0
    """weight of the entropy bonus"""
    target_kl: Rate = 0.1
    """nats a token from the sampling policy at which an update stops early"""
    kl_coef: Coefficient = 0.01
    """(first) price of a nat of KL to the reference"""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """keep that price, or steer it"""
    adaptive_kl_target: Rate = 6.0
    """nats a completion that the adaptive controller steers to"""
    importance_weight_cap: Rate = 2.0
    """largest weight that corrects for the sampler"""
    critic_warmup_steps: Count = 0
    """steps of the value head alone: before the run on rollouts_file, else the first ones"""

    # Evaluation, stopping, saving.
    eval_every: Count = 20
    """steps between evaluations on dev_file; 0: never"""
    eval_questions: Count = 0
    """of dev_file, the first N; 0: all"""
    dev_samples: Count = 0
    """also so many sampled answers to each dev question, whose mean accuracy is logged; 0: none"""
    dev_temperature: Rate | None = None
    """of those answers; none: the temperature of training"""
    patience: Count = 0
    """evaluations without a better accuracy that end the run; 0: never"""
    result: Literal["best", "last"] = "best"
    """the checkpoint of the best dev accuracy; or the last, which dev_file can still judge without bias"""
    max_minutes: Rate | None = None
    """end the run after the step in which so many minutes since its start are over; --resume goes on"""
    save_every: Positive = 10
    """steps between checkpoints"""
    keep_checkpoints: Positive = 2
    """newest checkpoints to keep, besides the best"""
    merge: bool = True
    """write the result as a plain model folder too"""

    # The machine.
    device: str = "auto"
    """auto: a GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the frozen weights; auto: as stored on a GPU, float32 on a CPU"""
    micro_batch_tokens: Positive = 16384
    """padded tokens a forward pass; lower it to save memory"""
    logit_chunk_tokens: Positive = 1024
    """positions whose logits exist at a time; lower it to save memory"""
    activation_checkpointing: bool = False
    """compute activations again in backward, to save memory"""
    torch_compile: bool = False
    """compile the trunk's layers: a slow start, fewer and larger kernels after it (needs a C compiler)"""
    preset: Literal["80gb", "40gb", "24gb"] | None = None
    """settings with which an 8B model trains and samples on one GPU of that size; what you give wins"""
    memory_limit_gb: Rate | None = None
    """GB (1e9 bytes) of the GPU that this command and its vLLM server may take together; none: all of it"""
    vllm_memory_gb: Rate | None = None
    """GB that our vLLM server may take, instead of vllm_memory_share"""
    vllm_sleep: bool = False
    """our vLLM server gives its memory back while the policy is trained"""
    offload: bool = False
    """the frozen weights leave the GPU while vLLM samples"""
    quantize: Literal["nf4"] | None = None
    """hold the frozen weights in 4 bits, here and in our vLLM server (QLoRA; needs bitsandbytes)"""
    dry_run: bool = False
    """print memory, tokens a step and an estimate of the time, and end"""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """The preset's settings, where no other value is given."""
        if isinstance(given, dict) and given.get("preset") in PRESETS:
            return PRESETS[given["preset"]] | given
        return given

    def _preset_of(self, name: str) -> Any:
        return PRESETS[self.preset].get(name) if self.preset else None

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.questions_per_update > self.batch_size:
            raise ValueError(
                "mini_batch_size * gradient_accumulation_steps is more than batch_size; lower it, "
                "or take more questions a step"
            )
        if self.advantages != "gae" and self.samples_per_question < 2:
            raise ValueError(f"advantages {self.advantages} needs samples_per_question of 2 or more")
        if self.skip_equal_groups and self.advantages == "gae":
            raise ValueError("skip_equal_groups needs advantages leave_one_out or group_normalised")
        if self.advantages != "gae" and self.reward_mode is RewardMode.QUESTION:
            raise ValueError(
                f"advantages {self.advantages} compares the completions of a question, which reward_mode "
                "question gives the same reward; use gae"
            )
        if self.decay_steps and self.decay_steps <= self.warmup_steps:
            raise ValueError("decay_steps must come after warmup_steps")
        if self.rollouts_file is None and (self.min_pass_rate, self.max_pass_rate) != (0.0, 1.0):
            raise ValueError(
                "min_pass_rate and max_pass_rate are of rollouts_file; name that, or leave them out"
            )
        if self.curriculum_steps and self.rollouts_file is None:
            raise ValueError("curriculum_steps needs rollouts_file, which says what is solved how often")
        if self.train == "full" and self.quantize:
            raise ValueError("quantize is for frozen weights; leave it out with train full")
        if (self.vllm_sleep or self.offload) and (self.sampler != "vllm" or self.vllm_urls):
            raise ValueError("vllm_sleep and offload need sampler vllm with a server of our own")
        if self.overlap and (self.sampler != "vllm" or self.vllm_sleep or self.offload):
            raise ValueError("overlap needs sampler vllm, and neither vllm_sleep nor offload")
        elsewhere = self.vllm_devices is not None or bool(self.vllm_urls)
        if self.reference_on_sampler and (
            self.sampler != "vllm" or not elsewhere or self.train == "full" or self.temperature != 1
        ):
            raise ValueError(
                "reference_on_sampler needs sampler vllm on other GPUs (vllm_devices or vllm_urls), train "
                "lora (the base model is the reference) and temperature 1 (vLLM knows no other for given "
                "texts)"
            )
        if self.dev_temperature and not self.dev_samples:
            raise ValueError("dev_temperature is of sampled dev answers; say how many with dev_samples")
        if self.offload and self.quantize:
            raise ValueError("offload and quantize do not go together; weights of 4 bits may stay")
        if self.train == "full" and self.merged_sampling:
            raise ValueError("merged_sampling needs an adapter to merge; leave it out with train full")
        if self.train == "full" and self.vllm_urls:
            raise ValueError("train full needs a vLLM server of our own; leave vllm_urls out")
        if self.torch_compile and self.sampler != "vllm":
            raise ValueError("torch_compile needs sampler vllm: sampling here would compile at every length")
        if self.patience and not (self.eval_every and self.dev_file):
            raise ValueError("patience needs eval_every and dev_file")
        return self

    @property
    def questions_per_update(self) -> int:
        """Questions whose completions make one optimizer step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def run_name(self) -> str:
        """What the reward service and the records know this run as."""
        return self.run_id or f"{self.output.name}-seed{self.seed}"
