"""For each invariant a one-line mutation of the code under which its test must fail; `test_mutants.py` runs them all.

A mutation replaces a piece of one line of a function's source. It is applied to the function's code object, so it holds
wherever the function has been imported to.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType

from kernels.ib_loss import _stream
from mfllm_ref import metrics
from mfllm_ref.lm import LanguageModel, tokenizer
from mfllm_ref.lm.lora import Adapters
from mfllm_ref.society import agora, prompts, readers, rollout, signals
from mfllm_ref.society.rollout import State
from mfllm_ref.society.signals import History


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `function`; `test`, "file::test" below tests/, must fail then."""

    test: str
    function: Callable
    old: str
    new: str

    @property
    def target(self) -> FunctionType:
        """The function itself, without its decorators."""
        return inspect.unwrap(self.function)

    def code(self) -> CodeType:
        """The mutated function's code. AssertionError where the source no longer holds `old`, on one line and once."""
        source = textwrap.dedent(inspect.getsource(self.target))
        assert source.count(self.old) == 1 and "\n" not in self.old + self.new, f"{self}: {source}"
        # The future import: names that annotations use may be there for type checkers only.
        code = compile("from __future__ import annotations\n" + source.replace(self.old, self.new), "<mutant>", "exec")
        namespace = dict(self.target.__globals__)
        exec(code, namespace)
        made = inspect.unwrap(namespace[self.target.__name__])
        assert made.__code__.co_freevars == self.target.__code__.co_freevars
        return made.__code__


FIELD, PARTS = "property/test_mean_field.py::", "property/test_parts.py::"
LARGE = "property/test_large_numbers.py::"
MUTANTS = [
    # (1) exchangeability
    Mutant(FIELD + "test_agents_of_a_step_are_exchangeable", State.mean_field_prompt,
           "sorted(actions, key=lambda a: (a.text, a.id))", "actions"),
    Mutant(FIELD + "test_agents_of_a_step_are_exchangeable", rollout._seed, "state.ids[index]", "index"),
    Mutant(FIELD + "test_agents_of_a_step_are_exchangeable", rollout._act,
           "sorted(action.text for action in actions[: settings.warmup])",
           "[action.text for action in state.world.event.actions[: settings.warmup]]"),
    Mutant(FIELD + "test_a_population_is_told_the_same_in_whatever_order_its_steps_came", History.update,
           "sorted(step, key=lambda seen: (hashed(salt, seen.text), seen.id))", "step"),
    # (2) conditional independence
    Mutant(FIELD + "test_a_world_does_not_depend_on_the_worlds_beside_it", rollout._act,
           "seeds += noise",
           "seeds += [seed + len(seeds) for seed in noise]"),
    Mutant(FIELD + "test_an_agent_does_not_depend_on_the_agents_beside_it", State.policy_prompts,
           "shared + prompts", "shared[:-1] + str(len(indices)) + prompts"),
    Mutant(FIELD + "test_an_agent_does_not_depend_on_how_work_is_cut", LanguageModel._generate_ids,
           "hashed[members(chunk)]", "hashed[:len(members(chunk))]"),
    Mutant(FIELD + "test_an_agent_does_not_depend_on_how_many_processes_share_the_work", rollout._seed,
           "state.world.seed,", "state.world.seed, torch.get_num_threads(),"),
    # (3) causality
    Mutant(FIELD + "test_no_real_action_after_the_warm_up_is_read", State.seen, "i >= self.real", "i > self.real"),
    Mutant(FIELD + "test_no_real_action_after_the_warm_up_is_read", State.__init__, "[: settings.warmup]", ""),
    Mutant(FIELD + "test_a_warm_up_action_changes_nothing_before_its_step_is_over", State.shared,
           "event.topic,", "event.topic + event.actions[self.settings.warmup - 1].text,"),
    Mutant(FIELD + "test_a_mean_field_depends_on_the_past_through_the_last_one_alone", State.mean_field_prompt,
           "sorted(actions,", "sorted(self.history.newest,"),
    Mutant(FIELD + "test_a_mean_field_depends_on_the_past_through_the_last_one_alone", State.shared,
           "self.mean_field)", "self.mean_field + repr(self.history.mean))"),
    # (4) warm-up
    Mutant(FIELD + "test_warm_up_texts_are_the_real_ones_byte_for_byte", rollout._act,
           "[actions[i].text for", "[actions[i].text.strip() for"),
    # (5) fixed point, (8) scaling
    Mutant(FIELD + "test_a_population_that_does_not_change_is_a_fixed_point", signals.moved,
           "mean + (now - mean) / weight", "(mean * (weight - 1) + now) / weight"),
    Mutant(FIELD + "test_duplicating_every_agent_leaves_the_empirical_shares_unchanged", History.update,
           "now[dimension], self.retention", "now[dimension], 0.9 ** len(step)"),
    Mutant(FIELD + "test_duplicating_every_agent_leaves_the_empirical_shares_unchanged", signals.shares,
           "counts / counts.sum()", "(counts + 0.5) / (counts + 0.5).sum()"),
    # (6) law of large numbers
    Mutant(LARGE + "test_shares_obey_the_law_of_large_numbers", agora.mean_field_map,
           "choice_probabilities(utility, coupling,", "choice_probabilities(utility, 1.5 * coupling,"),
    Mutant(LARGE + "test_shares_obey_the_law_of_large_numbers", signals.shares, "counts.sum() if", "counts.sum() * 1.1 if"),
    # (7) interventions, (9) common random numbers
    Mutant(FIELD + "test_an_intervention_that_inserts_nothing_changes_nothing", State.inserted,
           "actions = self.intervention.get(step, ())",
           "actions = self.intervention.get(step, ()) or [('', '')] * (step in self.intervention)"),
    Mutant(FIELD + "test_an_intervention_changes_nothing_before_it_is_seen", rollout._seed,
           "step, ", "step, len(state.intervention), "),
    Mutant(FIELD + "test_methods_that_show_an_agent_the_same_prompt_get_the_same_action", rollout._seed,
           "state.world.event.id", "state.world.method.name"),
    Mutant(FIELD + "test_equal_prompts_alone_do_not_make_equal_actions", rollout._seed, ", state.ids[index]", ""),
    # distributions
    Mutant(PARTS + "test_kl_is_never_negative_and_zero_for_equals_alone", metrics._kl,
           "np.log(p) - np.log(q)", "np.log(p) + np.log(q)"),
    Mutant(PARTS + "test_w1_is_a_metric", metrics._w1, "np.abs(", "np.maximum(0, "),
    Mutant(PARTS + "test_dtw_is_symmetric_and_the_cheapest_path", metrics._dtw,
           "np.minimum(last[start:stop], last[start + 1 : stop + 1])", "last[start:stop]"),
    Mutant(PARTS + "test_f1_lies_in_the_unit_interval", metrics._f1, "np.maximum(items, 1)", "np.maximum(items - hits, 1)"),
    # adapters
    Mutant(PARTS + "test_a_fresh_adapter_is_the_identity", Adapters.add, "torch.zeros(", "torch.ones("),
    Mutant(PARTS + "test_the_weight_delta_is_linear_in_alpha", Adapters.merge, "(b @ a) * scale", "(b @ a) * scale**2"),
    Mutant(PARTS + "test_merge_then_unmerge_restores_the_bits", Adapters.unmerge,
           ".weight = weight", ".weight = nn.Parameter(weight + 0, requires_grad=False)"),
    # words, files and tokenizers
    Mutant(PARTS + "test_shares_in_words_are_read_back", signals.verbalise, "{value:02d}", "{value // 10}0"),
    Mutant(PARTS + "test_events_are_read_as_they_were_written", readers._record, "action.agent.reach,", "None,"),
    Mutant(PARTS + "test_the_tiny_tokenizer_decodes_what_it_encoded", tokenizer.Tokenizer.decode_batch,
           "[list(ids) for ids in batch]", "[list(ids[:-1]) for ids in batch]"),
    Mutant(PARTS + "test_no_text_gives_a_special_or_added_id", tokenizer._Json.encode, "self.plain if", "self.full if"),
    Mutant(PARTS + "test_no_content_of_a_chat_closes_its_turn", tokenizer.Tokenizer._encode_parts,
           "self.model.find(parts[0])", "self.model.find(text)"),
    Mutant("property/test_hostile.py::test_nothing_that_is_written_forges_a_prompt", prompts.one_line,
           "text.split(maxsplit=limit)", "text.split(' ', maxsplit=limit)"),
    # the information bottleneck's terms
    Mutant(PARTS + "test_the_terms_of_the_bottleneck_are_bounded", _stream,
           "mean - log_sums[0] + log_sums[1]", "mean - log_sums[0]"),
    Mutant(PARTS + "test_the_terms_of_the_bottleneck_are_bounded", _stream,
           "chosen - top - log_sums", "chosen - top"),
]  # fmt: skip
