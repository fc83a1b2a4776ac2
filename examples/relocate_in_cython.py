import kernel

import lapse

lapse.setup(num_keys=10, num_threads=1)
server = lapse.Server(2)
kv = lapse.Worker(0, server)

for name, values in zip(("pulled   ", "localized"), kernel.relocate(kv)):
    print(name, *values)

kv.finalize()
server.shutdown()
