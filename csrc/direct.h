// The ops of a decode step on the CPU, called with tensors as they are.
//
// A step calls each of them once a layer or more often, between matrices that push all else out of
// the caches: a call costs the lines of code and data that it touches, in Python most of all. So
// everything from the check of the tensors to the result is in here.
#pragma once

#include <Python.h>

#include <string>

namespace glm4 {

// What an op is on the CPU: a function of the arguments of its schema. It calls `otherwise` with
// them where they do not fit each other, or not this path: that says why, or makes them fit. Where
// there is no such function, `otherwise` itself. A new reference.
PyObject* direct_call(const std::string& op, PyObject* otherwise);

}  // namespace glm4
