import lapse

lapse.setup(num_keys=10, num_threads=1)     # ten parameters; one worker thread in each process
server = lapse.Server(2)                    # two float32 numbers each
kv = lapse.Worker(0, server)

keys = [1, 3, 5]
kv.push(keys, [[1, 2]] * 3)                 # add, wherever the parameters are; every node does
kv.barrier()
print("pulled   ", *kv.pull(keys).tolist())
kv.localize(keys)                           # move them into the memory of this process
print("localized", *kv.pull(keys).tolist())     # from there, unless another node has localized them since

kv.finalize()
server.shutdown()
