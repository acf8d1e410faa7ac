// The Python module fdda_fast._C: importing it registers the CPU kernels; its functions choose
// among the instruction sets.
#include <Python.h>

#include <exception>

#include "cpu/kernels.h"
#include "program.h"

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(fdda::active_isa()); }

PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  if (!list) return nullptr;
  for (int i = 0; i < fdda::kNumIsas; ++i) {
    const fdda::Isa& isa = fdda::isas()[i];
    PyObject* item = Py_BuildValue("(sOO)", isa.name, isa.kernels ? Py_True : Py_False,
                                   isa.supported ? Py_True : Py_False);
    const int failed = item ? PyList_Append(list, item) : -1;
    Py_XDECREF(item);
    if (failed) {
      Py_DECREF(list);
      return nullptr;
    }
  }
  return list;
}

PyObject* select_isa(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "z", &name)) return nullptr;
  if (const char* error = fdda::select_isa(name)) {
    PyErr_Format(PyExc_ValueError, "instruction set '%s' %s", name ? name : "None", error);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* conv_kernel(PyObject*, PyObject*) {
  return PyUnicode_FromString(fdda::last_conv_kernel());
}

PyObject* peak(PyObject*, PyObject*) { return PyFloat_FromDouble(fdda::peak_macs_per_second()); }

PyObject* prefers_own_products(PyObject*, PyObject*) {
  return PyBool_FromLong(fdda::prefers_own_products());
}

PyObject* prefers_own_bfloat16_products(PyObject*, PyObject*) {
  return PyBool_FromLong(fdda::prefers_own_bfloat16_products());
}

constexpr char kProgram[] = "fdda_fast.Program";

bool integers(PyObject* sequence, std::vector<int64_t>* out) {
  const Py_ssize_t size = PySequence_Size(sequence);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = PySequence_GetItem(sequence, i);
    if (!item) return false;
    out->push_back(PyLong_AsLongLong(item));
    Py_DECREF(item);
    if (PyErr_Occurred()) return false;
  }
  return size >= 0;
}

// A Python error for what `body` throws.
template <class Body>
bool guarded(Body body) {
  try {
    body();
    return true;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return false;
  }
}

PyObject* program(PyObject*, PyObject* words) {
  std::vector<int64_t> values;
  if (!integers(words, &values)) return nullptr;
  fdda::Program* made = nullptr;
  if (!guarded([&] { made = new fdda::Program(values); })) return nullptr;
  return PyCapsule_New(made, kProgram, [](PyObject* capsule) {
    delete static_cast<fdda::Program*>(PyCapsule_GetPointer(capsule, kProgram));
  });
}

PyObject* run_program(PyObject*, PyObject* args) {
  PyObject *capsule, *addresses;
  int timed;
  if (!PyArg_ParseTuple(args, "OOp", &capsule, &addresses, &timed)) return nullptr;
  const void* pointer = PyCapsule_GetPointer(capsule, kProgram);
  std::vector<int64_t> values;
  if (!pointer || !integers(addresses, &values)) return nullptr;
  const fdda::Program& p = *static_cast<const fdda::Program*>(pointer);
  std::vector<const void*> inputs;
  for (int64_t v : values) inputs.push_back(reinterpret_cast<const void*>(v));
  std::vector<double> seconds(timed ? p.size() : 0);
  std::vector<const char*> kernels;
  PyThreadState* state = PyEval_SaveThread();  // as torch's operators do
  std::exception_ptr failure;
  try {
    p.run(inputs, timed ? seconds.data() : nullptr, timed ? &kernels : nullptr);
  } catch (...) {
    failure = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (failure && !guarded([&] { std::rethrow_exception(failure); })) return nullptr;
  PyObject* list = PyList_New(0);
  for (size_t i = 0; list && i < seconds.size(); ++i) {
    PyObject* item = Py_BuildValue("(sd)", kernels[i], seconds[i]);
    const int failed = item ? PyList_Append(list, item) : -1;
    Py_XDECREF(item);
    if (failed) Py_CLEAR(list);
  }
  return list;
}

PyMethodDef methods[] = {
    {"conv_kernel", conv_kernel, METH_NOARGS,
     "Name of the kernel this thread's last packed_conv2d ran."},
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"isas", isas, METH_NOARGS, "(name, has kernels of its own, supported here), lowest first."},
    {"peak", peak, METH_NOARGS,
     "8-bit multiply-accumulates per second of one thread on registers; 0: not known."},
    {"prefers_own_bfloat16_products", prefers_own_bfloat16_products, METH_NOARGS,
     "Whether this library's bfloat16 convolutions are faster than the framework's here."},
    {"prefers_own_products", prefers_own_products, METH_NOARGS,
     "Whether this library's float32 products are faster than the framework's here."},
    {"program", program, METH_O, "Decodes a sequence of integers, see program.h."},
    {"run_program", run_program, METH_VARARGS,
     "(program, addresses of its inputs, timed) -> (kernel, seconds) of every step if timed."},
    {"select_isa", select_isa, METH_VARARGS, "Select an instruction set; None: the best one."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
