//! The kernel bundle: a shared library that carries the flat image.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::elf::Flat;

/// Name and soname of the library.
pub const SONAME: &str = "libkrunfw.so.5";

/// The image is aligned to, and padded to, the largest page size of any host, in the file and in memory, so
/// that a VMM can map it into a guest without a copy.
pub const ALIGN: u64 = 64 << 10;

/// How much of an image has to be in the library: not the zeros at its end, which are a fifth of it. They
/// are the kernel's `.bss`, and what lies behind the image is fresh memory in every guest.
fn used(image: &[u8]) -> u64 {
    let last = image.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    (last as u64).next_multiple_of(ALIGN)
}

/// Builds the library from `flat` at `to`, with `compiler`, in the folder `work`.
///
/// # Errors
/// A file that cannot be written, or the compiler's messages.
pub fn build(flat: &Flat, compiler: &str, work: &Path, to: &Path) -> Result<(), String> {
    let whole = flat.image.len() as u64;
    if !whole.is_multiple_of(ALIGN) {
        return Err(format!("the image of {whole} bytes is not padded to 64 KiB"));
    }
    let size = used(&flat.image);
    let write = |name: &str, bytes: &[u8]| {
        fs::write(work.join(name), bytes).map_err(|e| format!("{}: {e}", work.join(name).display()))
    };
    write("kernel.bin", &flat.image[..size as usize])?;
    // Writable, because programs map or load it so; nothing else shares its pages.
    write(
        "image.S",
        format!(
            "\t.section .kernel, \"aw\", %progbits\n\t.balign {ALIGN}\n\t.globl krunfw_image\n\t.hidden krunfw_image\n\
             krunfw_image:\n\t.incbin \"kernel.bin\"\n\t.balign {ALIGN}\n\t.section .note.GNU-stack, \"\", %progbits\n"
        )
        .as_bytes(),
    )?;
    write(
        "bundle.c",
        format!(
            "#include <stddef.h>\n\
             extern char krunfw_image[] __attribute__((visibility(\"hidden\")));\n\
             char *krunfw_get_kernel(size_t *load_addr, size_t *entry_addr, size_t *size)\n{{\n\
             \t*load_addr = {:#x};\n\t*entry_addr = {:#x};\n\t*size = {size:#x};\n\treturn krunfw_image;\n}}\n\
             int krunfw_get_version(void)\n{{\n\treturn 5;\n}}\n",
            flat.load, flat.entry
        )
        .as_bytes(),
    )?;
    let out = Command::new(compiler)
        .args(["-shared", "-fPIC", "-O2", "-nostdlib", "-Wl,--build-id=none", "-Wl,-z,noexecstack"])
        .arg(format!("-Wl,-z,max-page-size={ALIGN}"))
        .arg(format!("-Wl,-soname,{SONAME}"))
        .args(["-o", SONAME, "bundle.c", "image.S"])
        .current_dir(work)
        .output()
        .map_err(|e| format!("cannot run {compiler}: {e}"))?;
    if !out.status.success() {
        return Err(format!("building {SONAME} failed:\n{}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    fs::rename(work.join(SONAME), to).map_err(|e| format!("{}: {e}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls a bundle the way a VMM does, and looks where its image lies in memory and in the file.
    const USER: &str = r#"
#include <stdio.h>
#include <string.h>
extern char *krunfw_get_kernel(size_t *, size_t *, size_t *);
extern int krunfw_get_version(void);
int main(void) {
    size_t load, entry, size;
    unsigned long from, to, offset;
    char line[4096], prot[8];
    char *image = krunfw_get_kernel(&load, &entry, &size);
    printf("%d %zx %zx %zx %c%c %lu", krunfw_get_version(), load, entry, size, image[0], image[size - 1] + '0',
           (unsigned long)image % 65536);
    FILE *maps = fopen("/proc/self/maps", "r");
    while (maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx %7s %lx", &from, &to, prot, &offset) == 4 &&
            from <= (unsigned long)image && (unsigned long)image + size <= to)
            printf(" %.3s %lu", prot, (offset + ((unsigned long)image - from)) % 65536);
    return 0;
}
"#;

    #[test]
    fn a_bundle_serves_its_image_mappable_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut image = vec![0u8; 5 * 65536];
        image[0] = b'K';
        image[2 * 65536] = 1;
        let flat = Flat { image, load: 0x100_0000, entry: 0x100_0123 };
        let library = dir.path().join("out.so");
        build(&flat, "gcc", dir.path(), &library).unwrap();
        fs::copy(&library, dir.path().join(SONAME)).unwrap();
        fs::write(dir.path().join("user.c"), USER).unwrap();
        let run = |command: &mut Command| {
            let out = command.current_dir(dir.path()).env("LD_LIBRARY_PATH", ".").output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            String::from_utf8(out.stdout).unwrap()
        };
        run(Command::new("gcc").args(["-o", "user", "user.c", "-L.", "-l:libkrunfw.so.5"]));
        assert_eq!(run(&mut Command::new(dir.path().join("user"))), "5 1000000 1000123 30000 K0 0 rw- 0");
    }

    #[test]
    fn an_unpadded_image_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let flat = Flat { image: vec![0; 65535], load: 0, entry: 0 };
        assert!(build(&flat, "gcc", dir.path(), &dir.path().join("x")).unwrap_err().contains("64 KiB"));
    }
}
