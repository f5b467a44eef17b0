"""One planner per family of key sets. Importing a module registers it with `attngen.plan.planner`, which asks for all of them when
it meets a key set that it does not know.
"""
