// A processor that says that it has every instruction set: included first by csrc/cpu/library.cpp.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __builtin_cpu_supports(name) true
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(d) = ~0u, 1)
#define syscall(...) 0L
