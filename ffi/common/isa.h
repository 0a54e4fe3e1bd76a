// Which instruction set a kernel may use, decided at run time.
#pragma once

namespace aqua {

// Levels of x86-64; each includes those before it. Other processors run kGeneric only.
enum class Isa : int {
  kGeneric = 0,     // what the compiler's baseline has
  kAvx2 = 1,        // AVX2 + FMA
  kAvx512 = 2,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16 = 3,  // + AVX-512 BF16
  kAmx = 4,         // + AMX-TILE and AMX-BF16, with the kernel's permission to use tiles
};

// The highest level this processor and operating system support. Asks Linux for the AMX tile
// state on first use (arch_prctl); a refusal means kAvx512Bf16.
Isa detected_isa();

// detected_isa(), or less when the environment variable AQUA_ISA names a lower level: generic,
// avx2, avx512, avx512bf16, amx. Read at every call, so that tests can switch.
Isa current_isa();

const char* isa_name(Isa isa);

}  // namespace aqua
