//! Gives the library the name that programs look for.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libkrun.so.1");
    println!("cargo::rerun-if-changed=build.rs");
}
