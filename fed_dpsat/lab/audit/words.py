"""The result of an audit as text: the bound, its confidence, its sample size, and its limits."""

from __future__ import annotations

from fed_dpsat.lab.audit.canaries import OneRunAudit
from fed_dpsat.lab.audit.game import GameResult
from fed_dpsat.lab.audit.membership import LOW_RATES, MembershipCurve

LIMITS = (
    "An audit shows the result of one attack. A bound above the ledger's epsilon means that something is broken; a "
    "bound below it does not mean that nothing is broken. A small bound can come from a weak attack or from few "
    "repetitions."
)


def one_run_words(result: OneRunAudit) -> str:
    """A paragraph on an audit with canaries."""
    attacker = {
        "gradient": "that sees every private gradient of the client and knows all its other data",
        "mislabelled": "that sees the global model of every round",
    }[result.attack]
    return (
        f"Canaries, {result.attack}: {_bound(result.epsilon_lower, result.confidence)} at delta {result.delta:g}, "
        f"against an attacker {attacker}. The ledger says epsilon <= {result.epsilon_ledger:.3f} for client "
        f"{result.client}. {result.canaries} canaries, {result.included} of them in the data by fair coins; "
        f"{result.correct} of {result.guesses} guesses were correct in one run; the number of guesses is the best of "
        f"{result.shares_tried} fixed numbers, and the confidence is corrected for that. {_verdict(result.broken)}"
    )


def game_words(result: GameResult) -> str:
    """A paragraph on a distinguishing game."""
    gaussian = ""
    if result.epsilon_if_gaussian is not None:
        gaussian = f" If the mechanism is Gaussian, epsilon >= {result.epsilon_if_gaussian:.3f}."
    return (
        f"Game on the mechanism: {_bound(result.epsilon_lower, result.confidence)} at delta {result.delta:g}, for "
        f"{result.steps} releases, against an attacker that sees each of them and chooses all data and models."
        f"{gaussian} The ledger says epsilon <= {result.epsilon_ledger:.3f} for these releases. {result.repetitions} "
        f"repetitions in each of two worlds; the first half selected the attack ({result.guess.score}), which has a "
        f"false positive rate of {result.false_positive_rate:.3f} and a false negative rate of "
        f"{result.false_negative_rate:.3f} on the second half. {_verdict(result.broken)}"
    )


def membership_words(result: MembershipCurve) -> str:
    """A paragraph on a membership-inference curve."""
    rates = ", ".join(
        f"{true:.2%} (sd over models {spread:.2%}) at {low:.1%}"
        for low, true, spread in zip(LOW_RATES, result.at_low, result.spread, strict=True)
    )
    return (
        f"Membership inference (LiRA, online): true positive rate {rates} false positives; area under the curve "
        f"{result.area:.3f}. {result.models} models, each on half of {result.examples} examples, each attacked with "
        f"the {result.models - 1} others; epsilon {result.epsilon_ledger:.3f} at delta {result.delta:g}. This is an "
        "attack on ordinary examples, not a bound."
    )


def _bound(epsilon: float, confidence: float) -> str:
    return f"epsilon >= {epsilon:.3f} with confidence {confidence:.0%}"


def _verdict(broken: bool) -> str:
    return "THE LEDGER'S CLAIM IS REFUTED." if broken else "The ledger's claim stands."
