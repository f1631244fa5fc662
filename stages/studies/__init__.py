"""Many runs under one protocol: the plan, the runner, the comparison."""
