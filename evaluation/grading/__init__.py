"""What decides whether a response is right: math-verify for answers, the sandbox for programs, lm_eval's checks for IFEval."""
