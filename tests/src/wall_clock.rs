use std::{fs, path::PathBuf, process::Command};

use tempfile::NamedTempFile;

/// What a program takes for the time of day, by Debian's libfaketime. The monotonic clock is real.
pub struct WallClock {
    file: NamedTempFile,
}

impl WallClock {
    /// One that is right.
    #[allow(
        clippy::new_without_default,
        reason = "a clock is a thing, not a value"
    )]
    pub fn new() -> WallClock {
        let file = NamedTempFile::new().expect("a file for the clock");
        let clock = WallClock { file };
        clock.set(0);
        clock
    }

    /// It is so many seconds ahead from now on, or behind.
    pub fn set(&self, seconds: i64) {
        fs::write(self.file.path(), format!("{seconds:+}\n")).expect("set the clock");
    }

    /// Makes a command go by this clock.
    pub fn rule(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", library())
            .env("FAKETIME_TIMESTAMP_FILE", self.file.path())
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DISABLE_SHM", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("DONT_FAKE_MONOTONIC", "1");
    }
}

fn library() -> PathBuf {
    let directories = fs::read_dir("/usr/lib").expect("list /usr/lib");
    let candidates = directories
        .flatten()
        .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    candidates
        .into_iter()
        .find(|path| path.exists())
        .expect("libfaketime: apt-get install faketime")
}
