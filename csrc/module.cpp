// The Python module fdda_fast._C: importing it registers the CPU kernels; its functions choose
// among the instruction sets.
#include <Python.h>

#include "cpu/kernels.h"

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

PyMethodDef methods[] = {
    {"conv_kernel", conv_kernel, METH_NOARGS,
     "Name of the kernel this thread's last packed_conv2d ran."},
    {"isa", isa, METH_NOARGS, "Name of the instruction set in use."},
    {"isas", isas, METH_NOARGS, "(name, has kernels of its own, supported here), lowest first."},
    {"select_isa", select_isa, METH_VARARGS, "Select an instruction set; None: the best one."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
