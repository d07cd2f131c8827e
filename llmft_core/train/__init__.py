"""Training: launch (the driver's side of Ray), worker (one rank), loop, loss, schedule, evaluation."""
