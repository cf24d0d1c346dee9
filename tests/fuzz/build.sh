#!/usr/bin/env bash
# Build the fuzz harness on the real parsing code into build/fuzz, if a source is newer: build.sh [--coverage].
set -euo pipefail
cd "$(dirname "$0")/../.."

out=build/fuzz
python=.venv/bin/python
cc=${FUZZ_CC:-clang}
target=$out/fuzz_queue
sanitize=(-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
if [ "${1:-}" = --coverage ]; then
    target=$out/fuzz_queue_coverage
    sanitize=(-fsanitize=fuzzer,address -fprofile-instr-generate -fcoverage-mapping)
fi
[ -x $python ] || python=python3
command -v "$cc" >/dev/null || { echo "fuzz: $cc is missing; apt-get install clang libclang-rt-dev" >&2; exit 1; }

mkdir -p $out
if [ -x "$target" ] && [ -z "$(find tests/fuzz csrc vdusefast \
    \( -name '*.[ch]' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.sh' \) -newer "$target" -print -quit)" ]; then
    exit 0
fi
# Two at once would write the same files.
exec 9>$out/.lock
flock 9
echo "fuzz: building $target"
# The directives of setup.py, which are those of the .pxd files too.
$python -m cython -3 --line-directives -I . -o $out/_fuzz.c \
    -X boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False tests/fuzz/_fuzz.pyx
read -r include libdir ldversion < <($python -c 'import sysconfig as s
print(s.get_path("include"), s.get_config_var("LIBDIR"), s.get_config_var("LDVERSION"))')
# The code under test guides the fuzzer; what only keeps the books does not.
flags=(-std=gnu11 -O1 -g -w -DVF_FUZZ -fno-omit-frame-pointer -Icsrc -Itests/fuzz -I"$include")
for name in fuzz_world fuzz_memory; do
    "$cc" "${flags[@]}" "${sanitize[@]/fuzzer,/}" -c -o $out/$name.o tests/fuzz/$name.c
done
# The Python library only satisfies references of the module's never-called initialisation.
"$cc" "${flags[@]}" "${sanitize[@]}" -include tests/fuzz/fuzz_hooks.h \
    -o "$target.new" $out/_fuzz.c $out/fuzz_world.o $out/fuzz_memory.o tests/fuzz/fuzz_input.c tests/fuzz/fuzz_queue.c \
    $(find csrc/{base,memory,ring,engine,queue} -name '*.c' | sort) \
    -L"$libdir" -Wl,-rpath,"$libdir" -lpython"$ldversion" -luring
mv "$target.new" "$target"
