#!/usr/bin/env bash
# Builds the C ABI of leank-cpu as a static and a shared library, and checks it from the side of C:
# the example and the test, as C99 and as C++17, on both libraries, and with sanitizers; the header
# against what the libraries export.
#
#     tools/capi.sh              # build and check
#     tools/capi.sh PREFIX       # then install to PREFIX/{include,lib,lib/pkgconfig}
#
# Needs a C and a C++ compiler and nm. Exit code 3: one of them is not here.
set -euo pipefail
[ $# = 0 ] || prefix=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

crate=leank-cpu
header=$crate/include/leank.h
target=$(tools/target_dir.sh)
work=$target/ci/capi
lib=$work/lib
mkdir -p "$lib"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
soname=libleank_cpu.so.${version%.*}
# What the standard library of Rust needs: `rustc --print native-static-libs`.
system=(-lgcc_s -lpthread -lm -ldl -lc)

for tool in cc c++ nm; do
    command -v $tool >/dev/null || { echo "capi: $tool is missing" >&2; exit 3; }
done

warnings=(-Wall -Wextra -Werror -pedantic)

# program LANGUAGE SOURCE NAME LIBRARY... : compiles it to $work/NAME.
program() {
    local language=$1 source=$2 name=$3
    shift 3
    case $language in
    c) cc -std=c99 "${warnings[@]}" -O1 -I $crate/include "$source" "$@" -o "$work/$name" ;;
    c++) c++ -std=c++17 "${warnings[@]}" -O1 -I $crate/include -x c++ "$source" -x none "$@" -o "$work/$name" ;;
    esac
}

# declared, exported LIBRARY: names of functions.
declared() { grep -oE '\bleank_[a-z_]+\(' $header | grep -v 'contiguous' | tr -d '(' | sort -u; }
exported() { nm "$@" --defined-only 2>/dev/null | awk '$2 == "T" { print $3 }' | sort -u; }

same_names() {
    diff "$work/declared" - || { echo "capi: < declared in $header, > exported by $1" >&2; exit 1; }
}

cargo rustc --quiet --locked --release --package $crate --lib --no-default-features \
    --features avx512,capi,huge-pages --crate-type staticlib,cdylib -- -C link-arg=-Wl,-soname,$soname
cp "$target/release/libleank_cpu.a" "$lib/"
cp "$target/release/libleank_cpu.so" "$lib/$soname"
ln -sf $soname "$lib/libleank_cpu.so"

declared >"$work/declared"
exported -D "$lib/$soname" | same_names "$soname"
exported -g "$lib/libleank_cpu.a" | grep '^leank_' | same_names libleank_cpu.a
while read -r name; do
    grep -q "\b$name(" $crate/tests/capi.c || { echo "capi: tests/capi.c does not call $name" >&2; exit 1; }
done <"$work/declared"
# The header by itself, in the oldest languages that it promises.
echo '#include <leank.h>' | cc -std=c99 "${warnings[@]}" -I $crate/include -fsyntax-only -x c -
echo '#include <leank.h>' | c++ -std=c++11 "${warnings[@]}" -I $crate/include -fsyntax-only -x c++ -

for language in c c++; do
    for source in examples/embed tests/capi; do
        name=$(basename $source)-$language
        program $language $crate/$source.c "$name-static" "$lib/libleank_cpu.a" "${system[@]}"
        program $language $crate/$source.c "$name-shared" -L "$lib" -lleank_cpu -lm -Wl,-rpath,"$lib"
        for kind in static shared; do
            echo "-- $name, $kind"
            "$work/$name-$kind"
        done
    done
done

sanitize=(-fsanitize=address,undefined -fno-sanitize-recover=all -g)
if echo 'int main(void) { return 0; }' | cc "${sanitize[@]}" -x c - -o "$work/sanitized" 2>/dev/null && "$work/sanitized"; then
    program c $crate/tests/capi.c capi-sanitized "${sanitize[@]}" "$lib/libleank_cpu.a" "${system[@]}"
    echo '-- capi, sanitized'
    "$work/capi-sanitized"
else
    echo 'capi: this compiler has no sanitizers; left out' >&2
fi
# Sees into the library too.
if command -v valgrind >/dev/null; then
    echo '-- capi, valgrind'
    valgrind --quiet --leak-check=full --error-exitcode=1 "$work/capi-c-static"
fi

[ $# -gt 0 ] || exit 0
mkdir -p "$prefix"/{include,lib/pkgconfig}
cp $header "$prefix/include/"
cp -P "$lib"/* "$prefix/lib/"
cat >"$prefix/lib/pkgconfig/leank.pc" <<PC
prefix=$prefix
Name: leank
Description: lean KV cache and decode attention on CPUs
Version: $version
Cflags: -I\${prefix}/include
Libs: -L\${prefix}/lib -lleank_cpu
Libs.private: ${system[*]}
PC
