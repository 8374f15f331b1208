"""Running a recipe: plan, work layer by layer, verify, commit, go on."""
