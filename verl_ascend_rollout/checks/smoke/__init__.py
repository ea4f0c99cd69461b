"""`ascend-safe smoke`: load a model, generate, check, report; the same report on every platform.

What runs in the process at the prompt, which imports neither torch nor vLLM:

    cli         the options, and what is wrong with them
    request     what is to be run: the model, the engine's arguments, the environment, and why they are that
    checkpoint  what a checkpoint's files say about the model
    run         the whole of it: engine, reference, report
    supervisor  one child process at a time: its messages, its time limit, its end
    lines       the engine's log: warnings that are known, and an error's cause
    machine     driver, toolkit, and processor
    parity      the engine's log-probabilities against the reference's
    text        the report for people, and the summary for the terminal
    measured    what a smoke report's facts are: the one schema that smoke writes and compare reads

In a child process each:

    child       starts the engine, asks it, and tells what it found
    engine      (there) vLLM's `LLM`, as the checks use it
    trials      (there) the checks that need an engine
    reference   Hugging Face's model on the CPU in float32

Inside vLLM's worker it is `verl_ascend_rollout.worker.smoke`.
"""
