"""One model over several devices of a process: who holds which part, and how they add up."""
