use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    panic,
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::{Error, ioctl};

/// A network namespace.
///
/// It holds the namespace's file open, and with it the namespace alive: drop it soon, or a
/// container's namespace outlives the container.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: (u64, u64),
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace at a path such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> Result<Netns, Error> {
        let path = path.as_ref();
        let open = || {
            // Opening a FIFO would wait for its other end.
            if !path.metadata()?.is_file() {
                return Err(io::Error::other("it is not a namespace's file"));
            }
            File::open(path)
        };
        Netns::from_file(open(), path)
    }

    /// The calling thread's namespace.
    pub fn current() -> Result<Netns, Error> {
        Netns::open("/proc/thread-self/ns/net")
    }

    /// Takes the calling thread into a new one, where who is root of a user namespace only may make
    /// devices.
    pub fn enter_new() -> Result<(), Error> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::Netns {
            path: "a new one".into(),
            cause: errno.into(),
        })
    }

    /// The namespace that a TUN device is in now.
    pub fn of_device(tun: BorrowedFd) -> Result<Netns, Error> {
        let file = ioctl::device_netns(tun).map_err(|cause| Error::Gone { cause })?;
        Netns::from_file(Ok(file.into()), Path::new("of the TUN device"))
    }

    /// The one that a descriptor is of, such as another process may send.
    pub fn of_descriptor(netns: OwnedFd) -> Result<Netns, Error> {
        Netns::from_file(Ok(netns.into()), Path::new("of the container"))
    }

    fn from_file(file: io::Result<File>, path: &Path) -> Result<Netns, Error> {
        let with_id = file.and_then(|file| {
            let metadata = file.metadata()?;
            Ok((file, (metadata.dev(), metadata.ino())))
        });
        let path = path.to_owned();
        match with_id {
            Ok((file, id)) => Ok(Netns { file, id, path }),
            Err(cause) => Err(Error::Netns { path, cause }),
        }
    }

    /// Device and inode: two values are of one namespace if and only if these are equal.
    pub fn id(&self) -> (u64, u64) {
        self.id
    }

    /// Whether it belongs to the caller's user namespace or to one below, so that root there may make
    /// devices in it. The host's does not for who is root of another user namespace only.
    pub fn is_ours(&self) -> Result<bool, Error> {
        match ioctl::owner(self.as_fd()) {
            Ok(_) => Ok(true),
            Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => Ok(false),
            Err(cause) => Err(self.error(cause)),
        }
    }

    /// Runs `f` in the namespace, on a thread of its own: the caller's never changes place.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, Error> {
        thread::scope(|scope| {
            thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, || {
                    setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                    Ok(f())
                })
                .map_err(|cause| self.error(cause))?
                .join()
                .unwrap_or_else(|payload| panic::resume_unwind(payload))
                .map_err(|errno: nix::Error| self.error(errno.into()))
        })
    }

    /// Takes the calling process, which must have one thread only, into the user namespace that owns
    /// this one. There it has all capabilities, and outside none: the kernel lets root in, and the
    /// user who made the user namespace.
    pub fn enter_owner(&self) -> Result<(), Error> {
        let owner = ioctl::owner(self.as_fd()).map_err(|cause| self.error(cause))?;
        setns(owner, CloneFlags::CLONE_NEWUSER).map_err(|errno| self.error(errno.into()))
    }

    fn error(&self, cause: io::Error) -> Error {
        Error::Netns {
            path: self.path.clone(),
            cause,
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
