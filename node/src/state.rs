//! What a node keeps on disk: its keys and the last map.
//!
//! Files are written whole beside the old and renamed over it, so a crash leaves one or the other.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tailnode_wire::keys::{
    DiscoKeyPair, DiscoPrivateKey, Export, ExportableKey, MachineKeyPair, MachinePrivateKey,
    NodeKeyPair, NodePrivateKey,
};
use tracing::warn;
use url::Url;

use crate::netmap::Netmap;

/// The keys that make a node itself. Their file's time of modification is that of
/// [`Store::save_latest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Names the machine to the control server. Never changes.
    pub machine: MachineKeyPair,
    /// Names the node to its peers, and is its WireGuard key. Changes when it expires.
    pub node: NodeKeyPair,
    /// Seals path discovery. Kept over restarts while the clock goes forward, unlike in tailscaled: peers know the node by it
    /// while the control server, which would announce a new one, is away.
    pub disco: DiscoKeyPair,
}

impl Keys {
    /// Keys of a node that never was.
    pub fn random() -> Self {
        Self {
            machine: MachineKeyPair::random(),
            node: NodeKeyPair::random(),
            disco: DiscoKeyPair::random(),
        }
    }
}

/// Why state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory cannot be made or read.
    #[error("cannot use {} for a node's state: {source}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has the directory.
    #[error(
        "{} is in use by another daemon: stop that one, or give this one another state directory",
        dir.display()
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The keys belong to a tailnet elsewhere.
    #[error(
        "{} belongs to a node of {recorded}, not of {wanted}: set login-server back, or remove the \
         directory to join as a new node",
        dir.display()
    )]
    OtherServer {
        /// The directory.
        dir: PathBuf,
        /// The login server that the node joined.
        recorded: String,
        /// The login server asked for.
        wanted: String,
    },
    /// The keys cannot be read.
    #[error(
        "{} is damaged (line {line}, column {column}): restore it from a backup, or remove it to \
         join as a new node",
        path.display()
    )]
    DamagedKeys {
        /// The file.
        path: PathBuf,
        /// Where it is wrong. What is there is not told: it may be a key.
        line: usize,
        /// Where in the line.
        column: usize,
    },
    /// A later release wrote the keys.
    #[error("{} was written by a newer release (format {version}): upgrade tailnode", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        version: u32,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}; is the disk full or read-only?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// One node's directory, held by one process at a time.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    login_server: Url,
    /// Its advisory lock (flock) goes when it is closed, even by a crash.
    handle: File,
}

/// The format of the files.
const VERSION: u32 = 1;
const KEYS: &str = "keys.json";
const NETMAP: &str = "netmap.json";

#[derive(Deserialize)]
struct Format {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct KeysFile {
    version: u32,
    login_server: String,
    machine: Export<MachinePrivateKey>,
    node: Export<NodePrivateKey>,
    disco: Export<DiscoPrivateKey>,
}

#[derive(Serialize)]
struct NetmapFile<'a> {
    version: u32,
    netmap: &'a Netmap,
}

#[derive(Deserialize)]
struct OwnedNetmapFile {
    netmap: Netmap,
}

impl Store {
    /// Takes a directory for a node of a login server, making it (0700) where it is not there yet.
    ///
    /// # Errors
    /// If another process has it, or it cannot be made.
    pub fn open(dir: &Path, login_server: &Url) -> Result<Self, Error> {
        let unusable = |source| Error::Unusable {
            dir: dir.into(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(unusable)?;
        let handle = File::open(dir).map_err(unusable)?;
        match handle.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { dir: dir.into() }),
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        let mode = handle.metadata().map_err(unusable)?.permissions().mode();
        if mode & 0o077 != 0 {
            warn!(dir = %dir.display(), "others could enter the state directory; closing it");
            handle
                .set_permissions(Permissions::from_mode(0o700))
                .map_err(unusable)?;
        }
        Ok(Self {
            dir: dir.into(),
            login_server: login_server.clone(),
            handle,
        })
    }

    /// The node's keys, made now if it has none.
    ///
    /// # Errors
    /// If they are damaged, or made for another login server: a node that quietly took new keys
    /// would lose its name and address.
    pub fn keys(&self) -> Result<Keys, Error> {
        let path = self.dir.join(KEYS);
        let Some(text) = read(&path)? else {
            let keys = Keys::random();
            self.save_keys(&keys)?;
            return Ok(keys);
        };
        let file: KeysFile = match parse(&text) {
            Ok(file) => file,
            Err(Unreadable::TooNew(version)) => return Err(Error::TooNew { path, version }),
            Err(Unreadable::Damaged(error)) => {
                let (line, column) = (error.line(), error.column());
                return Err(Error::DamagedKeys { path, line, column });
            }
        };
        if file.login_server != self.login_server.as_str() {
            return Err(Error::OtherServer {
                dir: self.dir.clone(),
                recorded: file.login_server,
                wanted: self.login_server.to_string(),
            });
        }
        Ok(Keys {
            machine: file.machine.import().into(),
            node: file.node.import().into(),
            disco: file.disco.import().into(),
        })
    }

    /// Keeps keys in the place of the old.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn save_keys(&self, keys: &Keys) -> Result<(), Error> {
        self.write(
            KEYS,
            &KeysFile {
                version: VERSION,
                login_server: self.login_server.to_string(),
                machine: keys.machine.private.export(),
                node: keys.node.private.export(),
                disco: keys.disco.private.export(),
            },
        )
    }

    /// The last map kept. One that cannot be read is renamed to end in `.bad` and is as good as
    /// none: the control server will send another.
    pub fn load_netmap(&self) -> Option<Netmap> {
        let path = self.dir.join(NETMAP);
        let why = match read(&path) {
            Ok(None) => return None,
            Ok(Some(text)) => match parse::<OwnedNetmapFile>(&text) {
                Ok(file) => return Some(file.netmap),
                Err(Unreadable::TooNew(version)) => format!("its format {version} is newer"),
                Err(Unreadable::Damaged(error)) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let aside = path.with_extension("json.bad");
        match fs::rename(&path, &aside) {
            Ok(()) => warn!(path = %aside.display(), why, "set the last network map aside"),
            Err(error) => warn!(path = %path.display(), why, %error, "cannot set it aside"),
        }
        None
    }

    /// Keeps a map in the place of the old.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_netmap(&self, netmap: &Netmap) -> Result<(), Error> {
        self.write(
            NETMAP,
            &NetmapFile {
                version: VERSION,
                netmap,
            },
        )
    }

    /// Keeps until when the node has run.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_latest(&self, time: SystemTime) -> Result<(), Error> {
        // Of no other use, and cheap: nothing is written but the time.
        let path = self.dir.join(KEYS);
        let write = || {
            let file = OpenOptions::new().write(true).open(&path)?;
            file.set_modified(time)
        };
        write().map_err(|source| Error::Write {
            path: path.clone(),
            source,
        })
    }

    /// Until when the node has run by what was kept last; `None`: it never has.
    pub fn latest(&self) -> Option<SystemTime> {
        fs::metadata(self.dir.join(KEYS)).ok()?.modified().ok()
    }

    fn write(&self, name: &str, content: &impl Serialize) -> Result<(), Error> {
        let path = self.dir.join(name);
        self.write_whole(name, &path, content)
            .map_err(|source| Error::Write { path, source })
    }

    fn write_whole(&self, name: &str, path: &Path, content: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(content)?;
        text.push(b'\n');
        // The name is ours alone while we hold the directory's lock; a crash may have left it.
        let beside = self.dir.join(format!(".{name}.new"));
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let replaced = Self::replace(path, &beside, &text);
        if replaced.is_err() {
            // A full disk needs the room; what goes wrong here goes wrong again above.
            let _ = fs::remove_file(&beside);
        }
        replaced?;
        // The rename itself is on disk only when the directory is.
        self.handle.sync_all()
    }

    fn replace(path: &Path, beside: &Path, text: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(beside)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(beside, path)
    }
}

enum Unreadable {
    TooNew(u32),
    Damaged(serde_json::Error),
}

/// Reads a file of our format; the version first, as a later one may look quite different.
fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, Unreadable> {
    let Format { version } = serde_json::from_slice(text).map_err(Unreadable::Damaged)?;
    if version > VERSION {
        return Err(Unreadable::TooNew(version));
    }
    serde_json::from_slice(text).map_err(Unreadable::Damaged)
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.into(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use chrono::Utc;
    use proptest::prelude::*;
    use tailnode_wire::tailcfg::{MapResponse, Node};

    use super::*;

    fn server() -> Url {
        "https://control.example/".parse().unwrap()
    }

    fn netmap() -> Netmap {
        let me = Node::new(1, NodeKeyPair::random().public);
        let peers = Some(vec![Node::new(2, NodeKeyPair::random().public)]);
        let first = MapResponse {
            node: Some(me),
            peers,
            ..Default::default()
        };
        let mut netmap = Netmap::default();
        netmap.restart(first, Utc::now());
        netmap
    }

    #[test]
    fn keys_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        let keys = Store::open(&dir, &server()).unwrap().keys().unwrap();
        assert_eq!(Store::open(&dir, &server()).unwrap().keys().unwrap(), keys);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(KEYS)), 0o600);
    }

    #[test]
    fn rotated_keys_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let mut keys = store.keys().unwrap();
        keys.node = NodeKeyPair::random();
        store.save_keys(&keys).unwrap();
        assert_eq!(store.keys().unwrap(), keys);
    }

    #[test]
    fn it_is_known_until_when_a_node_ran() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        assert_eq!(store.latest(), None);
        let keys = store.keys().unwrap();
        assert!(store.latest().is_some());
        let ahead = SystemTime::now() + Duration::from_secs(3600);
        store.save_latest(ahead).unwrap();
        assert_eq!(store.latest(), Some(ahead));
        assert_eq!(store.keys().unwrap(), keys);
    }

    #[test]
    fn two_daemons_do_not_share_a_node() {
        let dir = tempfile::tempdir().unwrap();
        let first = Store::open(dir.path(), &server()).unwrap();
        assert!(matches!(
            Store::open(dir.path(), &server()),
            Err(Error::InUse { .. })
        ));
        drop(first);
        Store::open(dir.path(), &server()).unwrap();
    }

    #[test]
    fn an_open_directory_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        Store::open(dir.path(), &server()).unwrap();
        assert_eq!(
            fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn a_node_stays_with_its_login_server() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path(), &server()).unwrap().keys().unwrap();
        let other = "https://other.example/".parse().unwrap();
        let error = Store::open(dir.path(), &other).unwrap().keys().unwrap_err();
        assert!(
            error
                .to_string()
                .contains("https://control.example/, not of https://other")
        );
    }

    #[test]
    fn damaged_keys_are_an_error_and_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let path = dir.path().join(KEYS);
        for text in ["", "{", "{}", r#"{"version":1}"#, "\0\0\0\0"] {
            fs::write(&path, text).unwrap();
            let error = store.keys().unwrap_err().to_string();
            assert!(error.contains("keys.json is damaged"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        fs::write(&path, r#"{"version":2,"other":"things"}"#).unwrap();
        assert!(matches!(
            store.keys(),
            Err(Error::TooNew { version: 2, .. })
        ));
    }

    #[test]
    fn a_damaged_map_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        assert_eq!(store.load_netmap(), None);
        let map = netmap();
        store.save_netmap(&map).unwrap();
        assert_eq!(store.load_netmap(), Some(map));
        fs::write(
            dir.path().join(NETMAP),
            "{\"version\":1,\"netmap\":{\"peers\"",
        )
        .unwrap();
        assert_eq!(store.load_netmap(), None);
        assert!(dir.path().join("netmap.json.bad").exists());
        assert!(!dir.path().join(NETMAP).exists());
    }

    #[test]
    fn a_crash_while_writing_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        let keys = store.keys().unwrap();
        fs::write(dir.path().join(".keys.json.new"), "{\"vers").unwrap();
        assert_eq!(store.keys().unwrap(), keys);
        store.save_keys(&keys).unwrap();
        assert_eq!(store.keys().unwrap(), keys);
    }

    #[test]
    fn a_failed_write_says_where_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &server()).unwrap();
        // Nothing can be renamed over a directory with something in it.
        fs::create_dir_all(dir.path().join(KEYS).join("x")).unwrap();
        let error = store.save_keys(&Keys::random()).unwrap_err().to_string();
        assert!(error.contains("keys.json"), "{error}");
        assert!(!dir.path().join(".keys.json.new").exists());
    }

    #[test]
    fn secrets_do_not_print() {
        let keys = Keys::random();
        let private = keys.node.private.export().to_string();
        assert!(!format!("{keys:?}").contains(&private[8..]));
    }

    proptest! {
        #[test]
        fn any_keys_come_back(bytes in any::<[[u8; 32]; 3]>()) {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path(), &server()).unwrap();
            let keys = Keys {
                machine: Export::<MachinePrivateKey>::from_bytes(bytes[0]).import().into(),
                node: Export::<NodePrivateKey>::from_bytes(bytes[1]).import().into(),
                disco: Export::<DiscoPrivateKey>::from_bytes(bytes[2]).import().into(),
            };
            store.save_keys(&keys).unwrap();
            prop_assert_eq!(store.keys().unwrap(), keys);
        }
    }
}
