// The devices of this process, as the choice of kernels sees them.
#pragma once

#include <vector>

#include "plan/device.h"

namespace jax_router::cuda {

// Asked of CUDA once; starts it, which an import must not do. Empty where there is none.
const std::vector<Device>& devices();

// The device that this thread launches on, or null.
const Device* current_device();

}  // namespace jax_router::cuda
