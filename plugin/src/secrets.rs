//! Where the auth keys are, and reading one.
//!
//! An option names the place and never holds the key: engines show options to whoever may ask them.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::value::RawValue;
use tailnode_node::{AuthKey, Secret};

use crate::{Error, endpoints::lock, identities::file_name};

/// The longest auth key, in bytes. One has about a hundred.
pub const MAX_KEY: u64 = 4096;

/// The largest of Podman's files about its secrets, each of which may have 512,000 bytes
/// (containers-common: pkg/secrets, maxSecretSize).
const MAX_PODMAN_FILE: u64 = 64 << 20;

/// Podman writes its files in place: one that cannot be read may be whole a moment later.
const PODMAN_WRITES: [Duration; 6] = [Duration::from_millis(40); 6];

/// Where an auth key, or an OAuth client's secret, is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// `file:/PATH`.
    File(PathBuf),
    /// `credential:NAME`: a credential that systemd gave the daemon (systemd.exec(5)).
    Credential(String),
    /// `secret:NAME`: a secret of root's Podman.
    Podman(String),
}

impl KeySource {
    /// Reads the value of an `auth-key` option. What is wrong, and what is right, is said without
    /// the value, which may be a key.
    pub fn parse(value: &str) -> Result<Self, &'static str> {
        if let Some(path) = value.strip_prefix("file:") {
            return if Path::new(path).is_absolute() {
                Ok(Self::File(path.into()))
            } else {
                Err("after `file:` comes an absolute path: file:/etc/tailnode/auth.key")
            };
        }
        let named = |name: &str| {
            let odd = |c: char| !(c.is_ascii_alphanumeric() || "-_.@".contains(c));
            // Neither a path nor a key.
            let fine = !name.starts_with('.') && !name.is_empty() && !name.contains(odd);
            (fine && !is_key(name)).then(|| name.to_owned())
        };
        if let Some(name) = value.strip_prefix("credential:") {
            let credential = named(name).map(Self::Credential);
            return credential.ok_or(
                "after `credential:` comes the name of a credential of tailnoded's unit, as in \
                 LoadCredential=NAME:/PATH",
            );
        }
        if let Some(name) = value.strip_prefix("secret:") {
            let secret = named(name).map(Self::Podman);
            return secret.ok_or(
                "after `secret:` comes the name of a secret of root's, as in \
                 `podman secret create NAME -`",
            );
        }
        Err(
            "a key given inline can be read by whoever may inspect: revoke it, give a new one to \
             `tailnode login NETWORK`, which asks for it, or put it into a file with \
             `install -m 600 /dev/stdin /etc/tailnode/auth.key` and set \
             auth-key=file:/etc/tailnode/auth.key; credential:NAME and secret:NAME (of Podman's) \
             name other places",
        )
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Credential(name) => write!(f, "credential:{name}"),
            Self::Podman(name) => write!(f, "secret:{name}"),
        }
    }
}

/// Whether a text that should be something else has an auth key in it, of Tailscale's or
/// Headscale's making, so that no message repeats it. The path of a file never does.
pub fn is_key(text: &str) -> bool {
    !text.starts_with("file:/") && ["tskey-", "hskey-"].iter().any(|mark| text.contains(mark))
}

/// An auth key that was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) key: AuthKey,
    /// Whether `tailnode login` gave it.
    pub(crate) by_login: bool,
}

/// The places of this host where keys are kept.
#[derive(Debug)]
pub(crate) struct Secrets {
    /// Where the keys of `tailnode login` are.
    kept: PathBuf,
    /// Where systemd puts the daemon's credentials.
    credentials: Option<PathBuf>,
    /// Where root's Podman has its secrets.
    podman: PathBuf,
    /// Held while a key is written.
    writing: Mutex<()>,
}

impl Secrets {
    /// `tailnode login` keeps keys below `kept`; `credentials` is `$CREDENTIALS_DIRECTORY`, `podman`
    /// the directory of Podman's secrets.
    pub(crate) fn new(kept: PathBuf, credentials: Option<PathBuf>, podman: PathBuf) -> Self {
        Secrets {
            kept,
            credentials,
            podman,
            writing: Mutex::default(),
        }
    }

    /// What nodes of a network join with: what its own option names, else what `tailnode login`
    /// keeps for it, else what the host's configuration names. `None`: a person must log in. Blocks
    /// for at most a quarter of a second.
    pub(crate) fn find(
        &self,
        network: &str,
        of_network: Option<&KeySource>,
        of_host: Option<&KeySource>,
    ) -> Result<Option<Found>, Error> {
        let kept = match of_network {
            Some(_) => None,
            None => self.kept(network)?,
        };
        let by_login = kept.is_some();
        let key = match (kept, of_network.or(of_host)) {
            (Some(key), _) => Some(key),
            (None, source) => source.map(|source| self.read(source)).transpose()?,
        };
        Ok(key.map(|key| Found { key, by_login }))
    }

    fn read(&self, source: &KeySource) -> Result<AuthKey, Error> {
        let read = match source {
            KeySource::File(path) => read_file(path).map_err(|cause| {
                let path = path.display();
                (
                    cause.to_string(),
                    format!("put a key there with `install -m 600 /dev/stdin {path}`"),
                )
            }),
            KeySource::Credential(name) => self.read_credential(name).map_err(|cause| {
                (
                    cause.to_string(),
                    format!(
                        "give tailnoded's unit LoadCredential={name}:/PATH (`systemctl edit \
                         tailnoded`) and restart it"
                    ),
                )
            }),
            KeySource::Podman(name) => self.read_podman(name).map_err(|cause| {
                (
                    cause,
                    format!(
                        "whoever tailnoded runs as, root on the host's, makes it with `podman secret \
                         create {name} -`; the secrets of a Docker swarm are not to be read by \
                         plugins, nor are those of other users: use `file:`"
                    ),
                )
            }),
        };
        let failed = |(reason, advice)| Error::AuthKey {
            place: source.to_string(),
            reason,
            advice,
        };
        let text = read.map_err(failed)?;
        AuthKey::parse(text.expose()).map_err(|bad| {
            failed((
                bad.to_string(),
                "put one key there, or an OAuth client's secret".into(),
            ))
        })
    }

    fn read_credential(&self, name: &str) -> io::Result<Secret> {
        let directory = self.credentials.as_ref().ok_or_else(|| {
            io::Error::other("systemd gave tailnoded no credentials ($CREDENTIALS_DIRECTORY)")
        })?;
        read_file(&directory.join(name))
    }

    /// Podman's own files are read, and Podman is not run: it would wait for locks that are held
    /// while it waits for us, and a daemon that may start programs is one that an attacker may make
    /// start programs (containers-common: pkg/secrets, pkg/secrets/filedriver).
    fn read_podman(&self, name: &str) -> Result<Secret, String> {
        #[derive(Deserialize)]
        struct Known {
            #[serde(default)]
            secrets: HashMap<String, Entry>,
            #[serde(default, rename = "nameToID")]
            ids: HashMap<String, String>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Entry {
            driver: String,
            #[serde(default)]
            driver_options: HashMap<String, String>,
        }
        let none = || "there is no such secret".to_owned();
        let known: Known = read_json(&self.podman.join("secrets.json"))?.ok_or_else(none)?;
        let id = known.ids.get(name).ok_or_else(none)?;
        let entry = known.secrets.get(id).ok_or_else(none)?;
        let directory = match &*entry.driver {
            "file" => entry.driver_options.get("path"),
            other => {
                return Err(format!(
                    "Podman keeps it by its driver `{other}`, and only those of the driver `file` \
                     can be read"
                ));
            }
        };
        let directory = directory.map_or_else(|| self.podman.join("filedriver"), PathBuf::from);
        let file = directory.join("secretsdata.json");
        let all: HashMap<String, Box<RawValue>> = read_json(&file)?.ok_or_else(none)?;
        let encoded = all.get(id).ok_or_else(none)?;
        let encoded = encoded.get().trim_matches('"');
        // No cause is told: it would quote what it fails on.
        let unreadable = || format!("{} holds it in an unknown form", file.display());
        let bytes = STANDARD.decode(encoded).map_err(|_| unreadable())?;
        let text = std::str::from_utf8(&bytes).map_err(|_| unreadable())?;
        Ok(Secret::new(text))
    }

    /// The key that `tailnode login` keeps for a network.
    fn kept(&self, network: &str) -> Result<Option<AuthKey>, Error> {
        let failed = |reason: String| Error::AuthKey {
            place: format!("that `tailnode login {network}` keeps"),
            reason,
            advice: "run that again".into(),
        };
        match read_file(&self.file_of(network)) {
            Ok(text) => AuthKey::parse(text.expose())
                .map(Some)
                .map_err(|bad| failed(bad.to_string())),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(failed(cause.to_string())),
        }
    }

    /// Keeps a key for the nodes that join a network from now on. Blocks.
    pub(crate) fn keep(&self, network: &str, key: &Secret) -> Result<(), Error> {
        AuthKey::parse(key.expose()).map_err(|bad| Error::BadLogin {
            reason: bad.to_string(),
        })?;
        let path = self.file_of(network);
        let write = || {
            let _alone = lock(&self.writing);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.kept)?;
            // No network's file has a name that begins so.
            let new = self.kept.join(".new");
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(key.expose().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.kept)?.sync_all()
        };
        write().map_err(Error::file("keep the auth key in", &path))
    }

    /// Forgets the key that is kept for a network; false if there was none. Blocks.
    pub(crate) fn forget(&self, network: &str) -> Result<bool, Error> {
        let path = self.file_of(network);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(cause) => Err(Error::file("remove", &path)(cause)),
        }
    }

    fn file_of(&self, network: &str) -> PathBuf {
        self.kept.join(file_name(network))
    }
}

/// Reads a file that only its owner should be able to read. It need not end for this to end.
fn read_file(path: &Path) -> io::Result<Secret> {
    let metadata = fs::metadata(path)?;
    // To open a FIFO would wait for its other end.
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mode = metadata.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(
            "the auth key in {0} is open to others than its owner (mode {1:03o}): \
             `chmod 600 {0}`, and revoke the key if somebody may have read it",
            path.display(),
            mode & 0o777
        );
    }
    let mut text = String::new();
    let read = File::open(path)?
        .take(MAX_KEY + 1)
        .read_to_string(&mut text)?;
    if read as u64 > MAX_KEY {
        return Err(io::Error::other("the file is too long to be a key"));
    }
    Ok(Secret::new(text))
}

/// Reads one of Podman's files; `None` where there is none.
fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>, String> {
    let failed = |cause: io::Error| format!("cannot read {}: {cause}", path.display());
    let mut pauses = PODMAN_WRITES.iter();
    loop {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(failed(cause)),
        };
        let mut bytes = Vec::new();
        file.take(MAX_PODMAN_FILE)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        match (serde_json::from_slice(&bytes), pauses.next()) {
            (Ok(value), _) => return Ok(Some(value)),
            (Err(_), Some(&pause)) => thread::sleep(pause),
            // No cause is told: it would quote what it fails on.
            (Err(_), None) => return Err(format!("{} is no file of Podman's", path.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const KEY: &str = "tskey-auth-QQQQ";

    struct Places {
        directory: tempfile::TempDir,
        secrets: Secrets,
    }

    fn places() -> Places {
        let directory = tempfile::tempdir().unwrap();
        let below = |name| directory.path().join(name);
        fs::create_dir(below("credentials")).unwrap();
        fs::create_dir_all(below("podman/filedriver")).unwrap();
        let secrets = Secrets::new(below("kept"), Some(below("credentials")), below("podman"));
        Places { directory, secrets }
    }

    impl Places {
        fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
            let path = self.directory.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            path
        }

        fn read(&self, value: &str) -> Result<AuthKey, String> {
            let source = KeySource::parse(value).unwrap();
            assert_eq!(source.to_string(), value);
            let read = self.secrets.read(&source);
            read.map_err(|error| error.to_string())
        }

        fn refused(&self, value: &str) -> String {
            let error = self.read(value).unwrap_err();
            assert!(!error.contains("QQQQ"), "{error}");
            error
        }
    }

    fn key(text: &str) -> AuthKey {
        AuthKey::parse(text).unwrap()
    }

    #[test]
    fn a_reference_is_taken_and_a_key_is_not() {
        for value in [
            "tskey-auth-QQQQ",
            "hskey-auth-QQQQ",
            "4f1dQQQQ",
            "file:tskey-auth-QQQQ",
            "file:QQQQ",
            "credential:tskey-auth-QQQQ",
            "credential:../QQQQ",
            "credential:",
            "secret:hskey-auth-QQQQ",
            "secret:a/QQQQ",
            "secret:.QQQQ",
            "/etc/QQQQ",
            "",
        ] {
            let reason = KeySource::parse(value).unwrap_err();
            assert!(!reason.contains("QQQQ"), "{reason}");
        }
        let inline = KeySource::parse(KEY).unwrap_err();
        for words in [
            "tailnode login NETWORK",
            "auth-key=file:/etc/tailnode/auth.key",
        ] {
            assert!(inline.contains(words), "{inline}");
        }
        assert!(is_key("name-tskey-auth-x") && !is_key("file:/etc/tskey-auth-x"));
    }

    #[test]
    fn a_key_is_read_from_its_file() {
        let places = places();
        let path = places.write("auth.key", format!("{KEY}\n"));
        let value = format!("file:{}", path.display());
        assert_eq!(places.read(&value), Ok(key(KEY)));
        for (text, words) in [
            ("\n".to_owned(), "nothing in it"),
            (format!("{KEY} {KEY}"), "more than one word"),
            (KEY.repeat(1000), "too long"),
            ("tskey-client-QQQQ?reusable=1".into(), "baseURL=URL"),
        ] {
            places.write("auth.key", text);
            let error = places.refused(&value);
            assert!(error.contains(words) && error.contains(&value), "{error}");
        }
        places.write("auth.key", b"QQQQ\xff");
        places.refused(&value);
        fs::remove_file(&path).unwrap();
        assert!(places.refused(&value).contains("install -m 600"));
        assert!(places.refused("file:/dev/zero").contains("no regular file"));
    }

    #[test]
    fn a_key_is_read_from_a_credential() {
        let mut places = places();
        places.write("credentials/tailnet", KEY);
        assert_eq!(places.read("credential:tailnet"), Ok(key(KEY)));
        let error = places.refused("credential:other");
        assert!(error.contains("LoadCredential=other:/PATH"), "{error}");
        places.secrets.credentials = None;
        let error = places.refused("credential:tailnet");
        assert!(error.contains("$CREDENTIALS_DIRECTORY"), "{error}");
    }

    #[test]
    fn a_key_is_read_from_podmans_secrets() {
        let places = places();
        let error = places.refused("secret:tailnet");
        assert!(error.contains("podman secret create tailnet -"), "{error}");

        let entry = |driver: &str, options| {
            json!({
                "name": "", "id": "", "createdAt": "2026-01-01T00:00:00Z", "driver": driver,
                "driverOptions": options,
            })
        };
        let path = places.directory.path().join("podman/filedriver");
        let known = json!({
            "secrets": {
                "a1": entry("file", json!({ "path": path })), "b2": entry("pass", json!({})),
                "c3": entry("file", json!({ "path": path })), "d4": entry("file", json!({ "path": path })),
            },
            "nameToID": { "tailnet": "a1", "passed": "b2", "odd": "c3", "gone": "d4" },
            "idToName": {},
        });
        places.write("podman/secrets.json", known.to_string());
        let data = json!({ "a1": STANDARD.encode(format!("{KEY}\n")), "c3": "QQQQ!" });
        let data = serde_json::to_string_pretty(&data).unwrap();
        places.write("podman/filedriver/secretsdata.json", &data);
        assert_eq!(places.read("secret:tailnet"), Ok(key(KEY)));
        for (value, words) in [
            ("secret:nobody", "no such secret"),
            ("secret:gone", "no such secret"),
            ("secret:passed", "its driver `pass`"),
            ("secret:odd", "unknown form"),
        ] {
            let error = places.refused(value);
            assert!(error.contains(words) && error.contains("swarm"), "{error}");
        }

        // Podman is in the middle of writing it.
        places.write("podman/filedriver/secretsdata.json", &data[..20]);
        thread::scope(|scope| {
            let reading = scope.spawn(|| places.read("secret:tailnet"));
            thread::sleep(PODMAN_WRITES[0]);
            places.write("podman/filedriver/secretsdata.json", &data);
            assert_eq!(reading.join().unwrap(), Ok(key(KEY)));
        });
        places.write("podman/filedriver/secretsdata.json", r#"{"a1":"QQQQ"#);
        let error = places.refused("secret:tailnet");
        assert!(error.contains("no file of Podman's"), "{error}");
    }

    #[test]
    fn a_login_is_kept_for_root_alone_until_it_is_forgotten() {
        let places = places();
        let secrets = &places.secrets;
        assert_eq!(secrets.find("tailnet", None, None).unwrap(), None);
        assert!(!secrets.forget("tailnet").unwrap());
        secrets
            .keep("tailnet", &Secret::new("tskey-auth-old"))
            .unwrap();
        secrets.keep("tailnet", &Secret::new(KEY)).unwrap();
        secrets.keep("../x", &Secret::new("tskey-auth-x")).unwrap();
        let kept = places.directory.path().join("kept");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&kept), mode(&kept.join("tailnet"))), (0o700, 0o600));
        assert_eq!(fs::read_dir(&kept).unwrap().count(), 2);

        // The network's own option comes before it, the host's after.
        let [own, host] = ["own", "host"].map(|name| {
            let path = places.write(name, format!("tskey-auth-{name}"));
            KeySource::File(path)
        });
        let find = |network, own, host| {
            let found = secrets.find(network, own, host).unwrap()?;
            assert_eq!(found.by_login, found.key == key(KEY));
            Some(found.key)
        };
        assert_eq!(
            find("tailnet", Some(&own), Some(&host)),
            Some(key("tskey-auth-own"))
        );
        assert_eq!(find("tailnet", None, Some(&host)), Some(key(KEY)));
        assert_eq!(
            find("other", None, Some(&host)),
            Some(key("tskey-auth-host"))
        );

        let bad = secrets.keep("tailnet", &Secret::new("QQQQ QQQQ"));
        let error = bad.unwrap_err().to_string();
        assert!(
            error.contains("more than one word") && !error.contains("QQQQ"),
            "{error}"
        );
        fs::write(kept.join("tailnet"), "").unwrap();
        let error = secrets.find("tailnet", None, None).unwrap_err().to_string();
        assert!(error.contains("`tailnode login tailnet`"), "{error}");
        assert!(secrets.forget("tailnet").unwrap());
        assert_eq!(find("tailnet", None, None), None);
    }

    proptest! {
        #[test]
        fn a_reference_reads_back_as_it_was_written(value: String) {
            if let Ok(source) = KeySource::parse(&value) {
                prop_assert_eq!(source.to_string(), value);
            }
        }
    }
}
