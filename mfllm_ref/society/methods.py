"""The methods that are compared: what each tells an agent, and which adapters write for it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """What an agent is told (`signal`) and which adapters write its action and its mean field; None is the bare backbone."""

    name: str
    signal: str  # "none", "recent", "popular", "empirical" or "mean-field"
    policy: str | None = None
    mean_field: str | None = None
    resamples: bool = False  # no model: actions are drawn from the warm-up's


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("state", "none"),
        Method("recent", "recent"),
        Method("popular", "popular"),
        Method("persistence", "none", resamples=True),
        Method("empirical", "empirical"),
        Method("mf-llm-no-ib", "mean-field"),
        Method("sft", "none", policy="sft"),
        Method("recent-sft", "recent", policy="recent-sft"),
        Method("popular-sft", "popular", policy="popular-sft"),
        Method("empirical-sft", "empirical", policy="empirical-sft"),
        Method("mf-llm-no-ib-policy", "mean-field", mean_field="mean-field"),
        Method("mf-llm-no-ib-mf", "mean-field", policy="policy-no-ib-mf"),
        Method("mf-llm", "mean-field", policy="policy", mean_field="mean-field"),
    )
}
