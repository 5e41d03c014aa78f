"""The terms of the report, each defined once: a page with a script shows the definition where the term is used."""

GLOSSARY = {
    "95 % CI": "The 95 % confidence interval: in 95 of 100 repetitions it contains the true value.",
    "A/A control": "A copy of the baseline, timed interleaved like a variant. It must not differ from the baseline.",
    "accuracy drop": "How much worse the score of a variant is than that of the baseline, on the same test examples.",
    "baseline": "The unchanged model, exported to the runtime's file format in FP32.",
    "budget": "The largest accuracy drop that the study allows.",
    "compressed": "Size of the file after zlib compression, such as for a download.",
    "conversions": "Operators that change number formats or memory layouts, such as quantize and dequantize.",
    "fidelity": "Agreement of a variant's outputs with the original model's, used without labels. It is no accuracy.",
    "inconclusive": "The interval allows both answers. More calls or more test examples would narrow it.",
    "latency / batch": "Time of one call with the given batch size: the fastest call of each slot, over all slots.",
    "machine too noisy": "The A/A control differs from the baseline, so that no speed-up of this machine is valid.",
    "MACs": "Multiply-accumulate operations for one example.",
    "no difference": "The entire interval of the speed-up is within 1 %.",
    "noise floor": "How far the speed of the A/A control is from that of the baseline.",
    "over budget": "The entire interval of the change exceeds the budget.",
    "p99": "Latency that 99 of 100 calls do not exceed; likewise p50 and p90.",
    "Pareto-optimal": "No other variant is at least as good in speed, accuracy and size, and better in one of them.",
    "regressions": "Test examples that the baseline predicts correctly and the variant does not.",
    "sparsity": "Fraction of the weights that are exactly zero.",
    "speed-up": "Time of the reference divided by that of the variant: 2\N{MULTIPLICATION SIGN} takes half the time.",
    "unsupported": "The runtime cannot run this recipe. No fallback was used.",
    "vs FP32, same runtime": "Speed-up over the baseline in the same runtime: the effect of compression.",
    "vs PyTorch": "Speed-up over your own module in PyTorch on the same device: compression, runtime and file format.",
    "within budget": "The entire interval of the change keeps the budget, corrected for the number of variants (Holm).",
}
"""Definitions by term, in the order of the alphabet."""
