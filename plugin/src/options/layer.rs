//! What each surface sets, and which of them is heard.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Options,
    table::{self, Entry, TABLE, Value},
    values, words,
};
use crate::{Error, owner::Owner, secrets::is_key};

/// Where options can be set. Of two, the later one is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Surface {
    /// The host's configuration file.
    File,
    /// The network, by `-o`.
    Network,
    /// What a container carries: labels, annotations and environment, its image's among them.
    Label,
    /// One container's use of the network.
    Endpoint,
}

/// Where exactly something was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    File(PathBuf),
    Network(String),
    Label(String),
    Annotation(String),
    Variable(String),
    Endpoint,
}

impl Origin {
    fn surface(&self) -> Surface {
        match self {
            Origin::File(_) => Surface::File,
            Origin::Network(_) => Surface::Network,
            Origin::Label(_) | Origin::Annotation(_) | Origin::Variable(_) => Surface::Label,
            Origin::Endpoint => Surface::Endpoint,
        }
    }

    /// With its preposition. The file and the network are named by who shows the error.
    fn place(&self) -> String {
        match self {
            Origin::File(_) => "in the configuration file".into(),
            Origin::Network(_) => "on the network".into(),
            Origin::Label(name) => format!("in the label {name}"),
            Origin::Annotation(name) => format!("in the annotation {name}"),
            Origin::Variable(name) => format!("in the container's environment, {name}"),
            Origin::Endpoint => "on one container".into(),
        }
    }

    /// Who can take a lock away, and how.
    fn owner(&self) -> &'static str {
        match self {
            Origin::File(_) => match Owner::here() {
                Owner::Host => "Root may change that there, and then `systemctl restart tailnoded`",
                Owner::User { .. } => {
                    "You may change that there, and then `systemctl --user restart tailnoded`"
                }
            },
            _ => "The network's owner may set it there, or make the network again without the lock",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File(path) => write!(f, "file {}", path.display()),
            Origin::Network(name) => write!(f, "network {name}"),
            Origin::Label(name) => write!(f, "label {name}"),
            Origin::Annotation(name) => write!(f, "annotation {name}"),
            Origin::Variable(name) => write!(f, "environment {name}"),
            Origin::Endpoint => write!(f, "endpoint"),
        }
    }
}

/// The annotation by which a container gets the kernel's TUN device, for a tunnel of its own.
pub const TUN_ANNOTATION: &str = "tailscale.tun";

/// What one surface sets. Its values have been read and are good.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer(BTreeMap<&'static str, Setting>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    value: String,
    origin: Origin,
}

/// What a container carries that may set options; its image's are among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its environment, as far as the engine shows it.
    pub environment: BTreeMap<String, String>,
}

impl Layer {
    /// Reads the options of the network `name`, `-o key=value`.
    pub fn of_network(name: &str, pairs: &BTreeMap<String, String>) -> Result<Self, Error> {
        Self::of_pairs(pairs, &Origin::Network(name.to_owned()))
    }

    /// Reads the options of one container on a network: Podman's `--network NAME:key=value`,
    /// Docker's `driver-opt`.
    pub fn of_endpoint(pairs: &BTreeMap<String, String>) -> Result<Self, Error> {
        Self::of_pairs(pairs, &Origin::Endpoint)
    }

    /// Reads what a container carries. Of one option's names `tailscale.KEY` wins over
    /// `tailscale.com/KEY`, that over Tailscale's variables; labels over annotations, those over
    /// the environment.
    pub fn of_marks(marks: &Marks) -> Result<Self, Error> {
        let mut layer = Layer::default();
        layer.set_variables(&marks.environment, Origin::Variable)?;
        let mut annotations = marks.annotations.clone();
        // For the hook alone, and no option of the node.
        annotations.remove(TUN_ANNOTATION);
        layer.set_carried(&annotations, Origin::Annotation)?;
        layer.set_carried(&marks.labels, Origin::Label)?;
        layer.agrees()
    }

    /// Reads the host's configuration file; one that does not exist sets nothing.
    pub fn of_file(path: &Path) -> Result<Self, Error> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(cause) => return Err(Error::file("read", path)(cause)),
        };
        let bad = |reason: String| Error::Config {
            path: path.to_owned(),
            reason,
        };
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            // Only the message: the error's other form quotes the line, which may be a key.
            let before = error.span().and_then(|span| text.get(..span.start));
            let line = 1 + before.unwrap_or_default().matches('\n').count();
            bad(format!("line {line}: {}", error.message()))
        })?;
        let mut pairs = BTreeMap::new();
        for (key, value) in table {
            let value = text_of(&key, &value).ok_or_else(|| {
                if is_key(&key) {
                    let place = Origin::File(path.to_owned()).place();
                    return bad(Error::KeyForOption { place }.to_string());
                }
                bad(format!(
                    "`{key}` must be a text, true or false, or for an option of several values a \
                     list of texts"
                ))
            })?;
            pairs.insert(key, value);
        }
        Self::of_pairs(&pairs, &Origin::File(path.to_owned()))
            .map_err(|error| bad(error.to_string()))
    }

    fn of_pairs(pairs: &BTreeMap<String, String>, origin: &Origin) -> Result<Self, Error> {
        let mut layer = Layer::default();
        for (key, value) in pairs {
            layer.set(key, value, origin)?;
        }
        layer.agrees()
    }

    /// Labels or annotations.
    fn set_carried(
        &mut self,
        pairs: &BTreeMap<String, String>,
        origin: fn(String) -> Origin,
    ) -> Result<(), Error> {
        self.set_variables(pairs, origin)?;
        for (name, value) in pairs {
            // The operator of Kubernetes has words of its own there: those are not for us.
            if let Some(key) = name.strip_prefix("tailscale.com/")
                && (table::find(key).is_some() || table::missing(key).is_some())
            {
                self.set(key, value, &origin(name.clone()))?;
            }
        }
        for (name, value) in pairs {
            if let Some(key) = name.strip_prefix("tailscale.")
                && !key.contains('/')
            {
                self.set(key, value, &origin(name.clone()))?;
            }
        }
        Ok(())
    }

    fn set_variables(
        &mut self,
        pairs: &BTreeMap<String, String>,
        origin: fn(String) -> Origin,
    ) -> Result<(), Error> {
        // The flags come last, as on the command line of `tailscale up`.
        let is_flags = |name: &str| name == words::FLAGS;
        let single = pairs.iter().filter(|(name, _)| !is_flags(name));
        for (name, value) in single.chain(pairs.iter().filter(|(name, _)| is_flags(name))) {
            for word in words::of_variable(name, value) {
                self.set(&word.key, &word.value, &origin(name.clone()))?;
            }
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str, origin: &Origin) -> Result<(), Error> {
        let place = || origin.place();
        if is_key(key) {
            // The name of a label or an annotation has the key in it too.
            let place = match origin {
                Origin::Label(_) => "in a label".into(),
                Origin::Annotation(_) => "in an annotation".into(),
                _ => place(),
            };
            return Err(Error::KeyForOption { place });
        }
        let Some(entry) = table::find(key) else {
            return Err(match table::missing(key) {
                Some(what) => Error::MissingFeature {
                    key: key.to_owned(),
                    place: place(),
                    what,
                },
                None => Error::UnknownOption {
                    key: key.to_owned(),
                    place: place(),
                    advice: table::nearest(key),
                },
            });
        };
        if !entry.surfaces.contains(&origin.surface()) {
            return Err(Error::MisplacedOption {
                key: entry.key,
                place: place(),
                advice: entry.elsewhere,
            });
        }
        read(entry, value, &mut Options::default()).map_err(|reason| Error::BadOption {
            key: entry.key,
            place: place(),
            reason,
        })?;
        let setting = Setting {
            value: value.to_owned(),
            origin: origin.clone(),
        };
        self.0.insert(entry.key, setting);
        Ok(())
    }

    /// This layer, if its options do not contradict each other.
    fn agrees(self) -> Result<Self, Error> {
        settle([&self]).map(|_| self)
    }
}

/// What holds for one container.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The values.
    pub options: Options,
    /// The same for people to read: every option there is but `lock`.
    pub told: Vec<Told>,
    surfaces: BTreeMap<&'static str, Surface>,
}

impl Settled {
    /// Who set an option; `None`: nobody.
    pub fn surface(&self, key: &str) -> Option<Surface> {
        self.surfaces.get(key).copied()
    }
}

/// An option's value, and who says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The option.
    pub key: String,
    /// Its value as it was set, or in words where nobody set it.
    pub value: String,
    /// `endpoint`, `label NAME`, `annotation NAME`, `environment NAME`, `network NAME`,
    /// `file PATH` or `default`.
    pub origin: String,
    /// Who locked it, if somebody did: `network NAME` or `file PATH`.
    pub locked_by: Option<String>,
}

/// Decides between layers, of which the lowest comes first: the file, the network, what the
/// container carries, the container's use of the network. An error where a layer sets what one
/// below it locks, and where the outcome contradicts itself.
pub fn settle<'a>(layers: impl IntoIterator<Item = &'a Layer>) -> Result<Settled, Error> {
    let mut heard: BTreeMap<&'static str, &Setting> = BTreeMap::new();
    let mut locks: BTreeMap<&str, &Origin> = BTreeMap::new();
    for Layer(settings) in layers {
        for (&key, setting) in settings {
            if let Some(lock) = locks.get(key) {
                return Err(Error::LockedOption {
                    key,
                    place: setting.origin.place(),
                    lock: lock.to_string(),
                    owner: lock.owner(),
                });
            }
            heard.insert(key, setting);
        }
        if let Some(lock) = settings.get("lock") {
            // Read once already, and good.
            for key in values::keys(&lock.value).unwrap_or_default() {
                locks.entry(key).or_insert(&lock.origin);
            }
        }
    }
    let mut options = Options::default();
    for entry in TABLE {
        if let Some(setting) = heard.get(entry.key) {
            read(entry, &setting.value, &mut options).map_err(|reason| Error::BadOption {
                key: entry.key,
                place: setting.origin.place(),
                reason,
            })?;
        }
    }
    options.routes()?;
    let surfaces = heard.values().map(|setting| setting.origin.surface());
    let surfaces = heard.keys().copied().zip(surfaces).collect();
    let told = TABLE
        .iter()
        .filter(|entry| entry.key != "lock")
        .map(|entry| {
            let setting = heard.get(entry.key);
            Told {
                key: entry.key.to_owned(),
                value: setting.map_or_else(|| entry.default.to_owned(), |set| set.value.clone()),
                origin: setting.map_or_else(|| "default".to_owned(), |set| set.origin.to_string()),
                locked_by: locks.get(entry.key).map(|lock| lock.to_string()),
            }
        });
    Ok(Settled {
        options,
        surfaces,
        told: told.collect(),
    })
}

fn read(entry: &Entry, value: &str, options: &mut Options) -> Result<(), String> {
    // Whatever the option is: this goes to terminals, logs and `inspect`.
    if entry.key != "auth-key" && is_key(value) {
        return Err(
            "this is an auth key, which `tailnode login NETWORK` asks for (revoke it: `inspect` \
             shows it)"
                .into(),
        );
    }
    (entry.read)(options, value)
}

/// A value of the configuration file as the other surfaces would give it.
fn text_of(key: &str, value: &toml::Value) -> Option<String> {
    let takes_list = table::find(key).is_none_or(|entry| matches!(entry.value, Value::List(_)));
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Array(texts) if takes_list => {
            let texts: Option<Vec<&str>> = texts.iter().map(toml::Value::as_str).collect();
            Some(texts?.join("+"))
        }
        _ => None,
    }
}
