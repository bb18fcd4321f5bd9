"""Whether a machine can run the project: facts are looked up once, checks are pure functions of them."""
