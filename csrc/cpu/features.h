// What this processor can run.
#pragma once

#include <string>
#include <vector>

namespace glm4 {

// Names of the instruction sets of interest that the processor has (cpuid) and whose registers the
// system saves (xgetbv); empty on other architectures than x86-64.
const std::vector<std::string>& cpu_features();

bool has_feature(const char* name);

}  // namespace glm4
