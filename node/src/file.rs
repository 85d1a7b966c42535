//! Files that are whole after a power cut, the old one or the new, and the directories they are in.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use chrono::{DateTime, Utc};

/// Puts `text` in the place of a file (0600). Between two calls for one file there must be some
/// order: it is written beside under a name that is always the same.
///
/// # Errors
/// If it cannot be written. The file is still a whole one then.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut replacement = Replacement::new(path, text)?;
    let written = STEPS.iter().try_for_each(|&step| replacement.perform(step));
    if written.is_err() {
        // A full disk needs the room; what goes wrong here goes wrong again with the next file.
        let _ = fs::remove_file(&replacement.beside);
    }
    written
}

/// Gives a file a second name that tells when it was found unusable, so that what is put in its
/// place destroys nothing. Returns that name.
///
/// # Errors
/// If the file system refuses.
pub fn set_aside(path: &Path, now: DateTime<Utc>) -> io::Result<PathBuf> {
    let when = now.format("%Y-%m-%dT%H-%M-%SZ");
    let mut number = 0;
    loop {
        let mut aside = path.as_os_str().to_owned();
        aside.push(match number {
            0 => format!(".damaged-{when}"),
            _ => format!(".damaged-{when}-{number}"),
        });
        // Unlike a renaming, this replaces nothing.
        match fs::hard_link(path, &aside) {
            Ok(()) => break sync_parent(path).map(|()| aside.into()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => break Err(error),
        }
    }
}

/// Makes a directory (0700) where it is not there yet, and those above it, to stay.
///
/// # Errors
/// If one cannot be made.
pub fn make_directory(path: &Path) -> io::Result<()> {
    let make = || DirBuilder::new().mode(0o700).create(path);
    let made = match (make(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => {
            make_directory(parent)?;
            make()
        }
        (made, _) => made,
    };
    match made {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// What is made, renamed or removed in a directory is on disk only when the directory is.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// What replaces a file. The power may be cut between any two, and in the middle of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Removes what a crash left beside.
    Clear,
    /// Makes the file beside.
    Create,
    Write,
    /// The bytes are on disk when this is done.
    SyncFile,
    Rename,
    /// The new name is on disk when this is done.
    SyncDirectory,
}

const STEPS: [Step; 6] = [
    Step::Clear,
    Step::Create,
    Step::Write,
    Step::SyncFile,
    Step::Rename,
    Step::SyncDirectory,
];

struct Replacement<'a> {
    path: &'a Path,
    beside: PathBuf,
    text: &'a [u8],
    /// The file beside, once it is made.
    file: Option<File>,
}

impl<'a> Replacement<'a> {
    fn new(path: &'a Path, text: &'a [u8]) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        let mut beside = OsString::from(".");
        beside.push(name);
        beside.push(".new");
        Ok(Self {
            path,
            beside: path.with_file_name(beside),
            text,
            file: None,
        })
    }

    fn perform(&mut self, step: Step) -> io::Result<()> {
        let file = self.file.as_mut().ok_or(io::ErrorKind::NotFound);
        match step {
            Step::Clear => match fs::remove_file(&self.beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            Step::Create => {
                let new = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&self.beside)?;
                self.file = Some(new);
                Ok(())
            }
            Step::Write => file?.write_all(self.text),
            Step::SyncFile => file?.sync_all(),
            Step::Rename => fs::rename(&self.beside, self.path),
            Step::SyncDirectory => sync_parent(self.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::unix::fs::PermissionsExt};

    use super::*;

    const OLD: &str = "the old one";
    const NEW: &str = "the new one, which is longer";

    /// A file system that owes nobody what was not synced: of names that changed, any may be on
    /// disk, and of a file's bytes, any part.
    #[derive(Clone, Default)]
    struct Disk {
        /// What each file on disk holds for certain, and what it should hold.
        files: Vec<(&'static str, &'static str)>,
        /// Which file has which name, for certain.
        names: BTreeMap<&'static str, usize>,
        /// Changes of names that are not synced: the file that has it now, or none.
        changes: Vec<(&'static str, Option<usize>)>,
    }

    const PLACE: &str = "file";
    const BESIDE: &str = "beside";

    impl Disk {
        fn with(text: Option<&'static str>) -> Self {
            let mut disk = Self::default();
            if let Some(text) = text {
                disk.files.push((text, text));
                disk.names.insert(PLACE, 0);
            }
            disk
        }

        /// What programs see.
        fn find(&self, name: &str) -> Option<usize> {
            let changed = self.changes.iter().rev().find(|(other, _)| *other == name);
            changed.map_or_else(|| self.names.get(name).copied(), |(_, file)| *file)
        }

        fn perform(&mut self, step: Step) {
            match step {
                Step::Clear => self.changes.push((BESIDE, None)),
                Step::Create => {
                    self.files.push(("", ""));
                    self.changes.push((BESIDE, Some(self.files.len() - 1)));
                }
                Step::Write => self.files.last_mut().unwrap().1 = NEW,
                Step::SyncFile => {
                    let file = self.files.last_mut().unwrap();
                    file.0 = file.1;
                }
                Step::Rename => {
                    let file = self.find(BESIDE);
                    self.changes.extend([(PLACE, file), (BESIDE, None)]);
                }
                Step::SyncDirectory => {
                    for (name, file) in self.changes.drain(..) {
                        match file {
                            Some(file) => self.names.insert(name, file),
                            None => self.names.remove(name),
                        };
                    }
                }
            }
        }

        /// All that the file may hold after a power cut.
        fn outcomes(&self) -> Vec<Option<String>> {
            let mut outcomes = Vec::new();
            for chosen in 0..1 << self.changes.len() {
                let mut names = self.names.clone();
                for (number, (name, file)) in self.changes.iter().enumerate() {
                    match file {
                        _ if chosen >> number & 1 == 0 => None,
                        Some(file) => names.insert(name, *file),
                        None => names.remove(name),
                    };
                }
                let Some((certain, wanted)) = names.get(PLACE).map(|&file| self.files[file]) else {
                    outcomes.push(None);
                    continue;
                };
                outcomes.push(Some(certain.to_owned()));
                if certain != wanted {
                    for length in 0..=wanted.len() {
                        outcomes.push(Some(wanted[..length].to_owned()));
                        // The length is on disk and the bytes are not.
                        outcomes.push(Some("\0".repeat(length)));
                    }
                }
            }
            outcomes
        }
    }

    /// What a power cut within or after each of the steps may leave that is neither the old file
    /// nor the new, or no longer the new when all is done.
    fn losses(steps: &[Step], old: Option<&'static str>) -> Vec<Option<String>> {
        let whole = [old.map(String::from), Some(NEW.to_owned())];
        let mut disk = Disk::with(old);
        let mut losses = Vec::new();
        for &step in steps {
            disk.perform(step);
            losses.extend(disk.outcomes().into_iter().filter(|it| !whole.contains(it)));
        }
        losses.extend(disk.outcomes().into_iter().filter(|it| *it != whole[1]));
        losses
    }

    #[test]
    fn a_power_cut_at_any_step_leaves_the_old_file_or_the_new() {
        for old in [Some(OLD), None] {
            assert_eq!(losses(&STEPS, old), []);
            // This is not for want of trying: it takes every one of them.
            for left_out in [
                Step::Write,
                Step::SyncFile,
                Step::Rename,
                Step::SyncDirectory,
            ] {
                let mut steps = STEPS.to_vec();
                steps.retain(|step| *step != left_out);
                assert_ne!(losses(&steps, old), [], "without {left_out:?}");
            }
            let mut steps = STEPS;
            steps.swap(3, 4);
            assert_ne!(losses(&steps, old), [], "renamed before it is written");
        }
    }

    #[test]
    fn after_a_crash_at_any_step_a_file_is_replaced_as_ever() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for stop in 0..=STEPS.len() {
            for part in 0..=NEW.len() {
                fs::write(&path, OLD).unwrap();
                let mut replacement = Replacement::new(&path, &NEW.as_bytes()[..part]).unwrap();
                for &step in &STEPS[..stop] {
                    // Only what is complete is renamed.
                    replacement.text = match step {
                        Step::Write if stop > 3 => NEW.as_bytes(),
                        _ => replacement.text,
                    };
                    replacement.perform(step).unwrap();
                }
                let now = fs::read_to_string(&path).unwrap();
                assert_eq!(now, if stop > 4 { NEW } else { OLD });
                replace(&path, b"the next").unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"the next");
                assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
            }
        }
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_is_set_aside_replaces_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let now = "2026-03-04T05:06:07Z".parse().unwrap();
        let mut names = Vec::new();
        for text in ["one", "two", "three"] {
            replace(&path, text.as_bytes()).unwrap();
            let aside = set_aside(&path, now).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            names.push((aside, text));
        }
        for (aside, text) in &names {
            assert_eq!(fs::read_to_string(aside).unwrap(), *text);
        }
        let (first, second) = (&names[0].0, &names[1].0);
        assert!(first.ends_with("keys.json.damaged-2026-03-04T05-06-07Z"));
        assert!(second.ends_with("keys.json.damaged-2026-03-04T05-06-07Z-1"));
    }

    #[test]
    fn directories_are_made_for_their_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/c");
        for _ in 0..2 {
            make_directory(&path).unwrap();
        }
        for path in [&path, path.parent().unwrap()] {
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
        }
    }
}
