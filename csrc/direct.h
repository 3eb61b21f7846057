// The ops of a decode step on the CPU, called with tensors as they are.
//
// A step calls each of them once a layer or more often, between matrices that push all else out of
// the caches: what a call costs is the lines of code and data that it touches, in Python most of
// all. So everything from the check of the tensors to the result is in here. A call returns None
// for arguments that do not fit each other, or not this path: Python then says why, or makes them
// fit.
#pragma once

#include <Python.h>

namespace glm4 {

// Methods for the module; the last one has no name.
extern PyMethodDef DIRECT_CALLS[];

}  // namespace glm4
