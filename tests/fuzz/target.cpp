/* The program that libFuzzer drives: a Python in whose process the compiled modules of this tree are loaded, and no Python code in the loop
   but for a refused promise's last words. tools/fuzz.py compiles and runs it. */
#include <Python.h>
#include <sanitizer/lsan_interface.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

extern "C" size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static int (*run)(const uint8_t *data, size_t size);
static size_t (*mutate)(uint8_t *data, size_t size, size_t max_size, uint64_t seed, size_t (*inner)(uint8_t *, size_t, size_t));

static void stop(const char *what)
{
    if (PyErr_Occurred()) PyErr_Print();
    fprintf(stderr, "fuzz: %s\n", what);
    exit(2);
}

static void count(void)
{
    PyRun_SimpleString("print('fuzz: %d frames accepted, %d refused' % _mutator.figures(), file=sys.stderr, flush=True)\n");
}

extern "C" int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    PyConfig config;
    PyStatus status;
    (void)argc, (void)argv;
    __lsan_disable();           /* what the interpreter keeps until its end is not what we look for */
    PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0;
    config.write_bytecode = 0;
    PyConfig_SetBytesString(&config, &config.executable, FUZZ_PYTHON);
    status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status)) Py_ExitStatusException(status);
    if (PyRun_SimpleString("import sys; sys.path.insert(0, '" FUZZ_TREE "')\nfrom tests.fuzz import states, _mutator\nstates.make_places()\n"))
        stop("the modules cannot be loaded");
    PyObject *module = PyImport_ImportModule("tests.fuzz._mutator");
    PyObject *doors = module ? PyObject_CallMethod(module, "doors", NULL) : NULL;
    if (!doors) stop("the modules have no way in");
    run = reinterpret_cast<decltype(run)>(PyLong_AsVoidPtr(PyTuple_GetItem(doors, 0)));
    mutate = reinterpret_cast<decltype(mutate)>(PyLong_AsVoidPtr(PyTuple_GetItem(doors, 1)));
    atexit(count);
    __lsan_enable();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (run(data, size)) abort();
    return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed)
{
    return mutate(data, size, max_size, seed, LLVMFuzzerMutate);
}
