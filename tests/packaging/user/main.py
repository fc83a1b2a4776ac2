"""Runs the user's module on the installed package, as a job of one node in this process."""
import user

import lapse

lapse.setup(8, 1)
server = lapse.Server(2)
kv = lapse.Worker(0, server)
user.exercise(kv)
kv.finalize()
server.shutdown()
print("all steps are right")
