//! Kernels in files, of each format.

use crate::harness::{Case, Env, Failure, contains, no_guest, run, same};
use krun::{Kernel, KernelFormat, Vm};

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
