// The dtypes of operands.
#pragma once

namespace svitt {

enum class Dtype { f32, bf16, f16 };

}  // namespace svitt
