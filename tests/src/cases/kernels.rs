//! Kernels in files, of each format.

use std::io::Read;

use krun::{Kernel, KernelFormat, Serial, Vm, VmConfig};

use crate::harness::{Case, Env, Failure, TempDir, contains, no_guest, run, same};

pub const BZIMAGE: Case = Case { name: "kernels_bzimage", host: bzimage, guest: no_guest };
pub const CASE: Case = Case { name: "kernels", host, guest: no_guest };

fn host(env: &Env) -> Result<(), Failure> {
    let Some(dir) = std::env::var_os("KRUN_TEST_KERNELS").map(std::path::PathBuf::from) else {
        return Err(Failure::Skip("KRUN_TEST_KERNELS names no directory of kernel images".into()));
    };
    let formats = [
        ("vmlinux", KernelFormat::Elf),
        ("image", KernelFormat::Raw),
        ("image.gz", KernelFormat::ImageGz),
        ("image.bz2", KernelFormat::ImageBz2),
        ("image.zst", KernelFormat::ImageZstd),
    ];
    let kernel =
        |path: std::path::PathBuf, format| Kernel::File { path, format, initramfs: None, cmdline: None };
    for (name, format) in formats {
        let path = dir.join(name);
        if !path.exists() {
            return Err(Failure::Wrong(format!("{} is missing", path.display())));
        }
        let mut config = env.shell("exit 6");
        config.kernel = kernel(path.clone(), format);
        let code = run(config).map_err(|e| Failure::Wrong(format!("{name}: {e:?}")))?.code;
        same(name, code, 6)?;

        // Half of it is no kernel, and says so before anything runs.
        let bytes = std::fs::read(&path)?;
        let half = std::env::temp_dir().join(format!("half-{name}"));
        std::fs::write(&half, &bytes[..bytes.len() / 2])?;
        let mut config = env.shell("exit 6");
        config.kernel = kernel(half.clone(), format);
        let refused = Vm::start(config).err().map(|e| e.to_string());
        std::fs::remove_file(&half)?;
        match refused {
            Some(text) => contains("half a kernel", &text, &format!("half-{name}"))?,
            None => return Err(Failure::Wrong(format!("half of {name} was started"))),
        }
    }
    Ok(())
}

/// What the init of [`bzimage`] prints.
const HELLO: &[u8] = b"hello from a stock kernel\n";

/// A distribution's kernel, which unpacks itself, with an initial RAM disk: its drivers for our devices are modules.
fn bzimage(env: &Env) -> Result<(), Failure> {
    let Some(path) = std::env::var_os("KRUN_TEST_BZIMAGE").map(std::path::PathBuf::from) else {
        return Err(Failure::Skip("KRUN_TEST_BZIMAGE names no bzImage".into()));
    };
    let dir = TempDir::new("bzimage")?;
    let initramfs = dir.path().join("initramfs");
    std::fs::write(&initramfs, cpio(&[("init", &init()), ("TRAILER!!!", b"")]))?;
    let (mut reader, writer) = std::io::pipe()?;
    let kernel = |path| Kernel::File {
        path,
        format: KernelFormat::Raw,
        initramfs: Some(initramfs.clone()),
        cmdline: None,
    };
    let config = VmConfig {
        memory_mib: 512,
        kernel: kernel(path.clone()),
        kernel_console: Some("ttyS0".into()),
        serial: Some(Serial { input: None, output: Some(writer.into()) }),
        shares: Vec::new(),
        init: false,
        ..env.shell("true")
    };
    let vm = Vm::start(config)?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        reader.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let ended = vm.wait();
    drop(vm);
    let text = reader.join().map_err(|_| "the reader panicked")??;
    contains("serial console", &text, std::str::from_utf8(HELLO)?.trim_end())?;
    let ended = ended.err().map(|e| e.to_string()).unwrap_or_default();
    contains("how it ended", &ended, "reset")?;

    let bytes = std::fs::read(&path)?;
    let half = dir.path().join("half");
    std::fs::write(&half, &bytes[..bytes.len() / 2])?;
    let refused = Vm::start(VmConfig { kernel: kernel(half), ..env.shell("true") }).err();
    contains("half a kernel", &refused.map(|e| e.to_string()).unwrap_or_default(), "half")
}

/// An archive in the format that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).
fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, data) in files {
        let mut field = |value: usize| archive.extend(format!("{value:08x}").bytes());
        // inode, mode, owner, group, links, time, length, device (2), special device (2), length of the name, sum
        for value in [0, 0o100_755, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            field(value);
        }
        let at = archive.len() - 13 * 8;
        archive.splice(at..at, *b"070701");
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// A program that prints [`HELLO`] and restarts the machine, as an ELF file of one segment.
fn init() -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut code = vec![0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0]; // mov eax, SYS_write; mov edi, 1
    code.extend([0x48, 0x8d, 0x35]); // lea rsi, [rip + distance]: HELLO, which follows the code
    let distance_at = code.len();
    code.extend([0; 4]);
    code.extend([0xba, HELLO.len() as u8, 0, 0, 0, 0x0f, 0x05]); // mov edx, length; syscall
    code.extend([0xb8, 16, 0, 0, 0, 0xbf, 1, 0, 0, 0]); // mov eax, SYS_ioctl; mov edi, 1
    code.extend([0xbe, 0x09, 0x54, 0, 0, 0xba, 1, 0, 0, 0, 0x0f, 0x05]); // TCSBRK with 1: until it is sent; syscall
    code.extend([0xb8, 169, 0, 0, 0, 0xbf, 0xad, 0xde, 0xe1, 0xfe]); // mov eax, SYS_reboot; mov edi, magic
    code.extend([0xbe, 0x69, 0x19, 0x12, 0x28, 0xba, 0x67, 0x45, 0x23, 0x01, 0x0f, 0x05]); // mov esi, edx; syscall
    code.extend([0xeb, 0xfe]); // jmp to itself
    let distance = (code.len() - distance_at - 4) as u32;
    code[distance_at..distance_at + 4].copy_from_slice(&distance.to_le_bytes());
    code.extend_from_slice(HELLO);
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for value in [AT + HEADERS, 64, 0] {
        elf.extend_from_slice(&value.to_le_bytes());
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for value in [0, AT, AT, size, size, 0x1000u64] {
        elf.extend_from_slice(&value.to_le_bytes());
    }
    elf.extend(code);
    elf
}
