//! What an image may not decide. Some versions of Podman give a container the annotations of its
//! image, and say nowhere which those are; but a device, capabilities and a place on a tailnet are for
//! who runs the container to grant. So they are looked up where Podman and CRI-O keep their images.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use crate::wish;

/// One of a driver's containers (containers/storage: Container).
#[derive(Deserialize)]
struct Container {
    #[serde(default)]
    layer: String,
    #[serde(default)]
    image: String,
}

#[derive(Default, Deserialize)]
struct Manifest {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// An error if one of our annotations is the image's own. `root` is the container's file system.
pub fn allows(annotations: &BTreeMap<String, String>, root: Option<&Path>) -> Result<(), String> {
    if !wish::is_any(annotations) {
        return Ok(());
    }
    // One that is no part of a storage was given by `--rootfs`, and has no image.
    let Some((root, storage)) = root.and_then(|root| Some((root, Storage::around(root)?))) else {
        return Ok(());
    };
    let of_image = storage
        .annotations(root)
        .map_err(|error| format!("cannot tell which annotations are the image's own: {error}"))?;
    match wish::ours(annotations)
        .find(|(key, value)| of_image.get(*key).is_some_and(|of| of == value))
    {
        None => Ok(()),
        Some((key, value)) => Err(format!(
            "the annotation {key}={value} is its image's, and an image cannot ask for this: \
             give another value by --annotation, or make an image without it"
        )),
    }
}

/// Where a driver keeps its containers and images.
struct Storage {
    containers: PathBuf,
    images: PathBuf,
}

impl Storage {
    /// The one with this file system in it.
    fn around(root: &Path) -> Option<Storage> {
        root.ancestors().find_map(|driver| {
            let name = driver.file_name()?.to_str()?;
            let sibling = |kind: &str| driver.with_file_name(format!("{name}-{kind}"));
            let (containers, images) = (sibling("containers"), sibling("images"));
            containers
                .is_dir()
                .then_some(Storage { containers, images })
        })
    }

    /// Those of the image that this file system was made of.
    fn annotations(&self, root: &Path) -> Result<BTreeMap<String, String>, String> {
        // `podman run --rm` is in the second.
        for list in ["containers.json", "volatile-containers.json"] {
            let containers: Vec<Container> = read(&self.containers.join(list))?.unwrap_or_default();
            let of = |container: &Container| {
                let mut parts = root.iter();
                !container.layer.is_empty() && parts.any(|part| part == container.layer.as_str())
            };
            let Some(container) = containers.into_iter().find(of) else {
                continue;
            };
            if container.image.is_empty() {
                return Ok(BTreeMap::new());
            }
            let file = self.images.join(container.image).join("manifest");
            let manifest: Manifest = read(&file)?.unwrap_or_default();
            return Ok(manifest.annotations.unwrap_or_default());
        }
        Err(format!(
            "{} is not in {}",
            root.display(),
            self.containers.display()
        ))
    }
}

/// A file of JSON, if there is one.
fn read<T: DeserializeOwned>(file: &Path) -> Result<Option<T>, String> {
    let failed = |error: io::Error| format!("{}: {error}", file.display());
    match fs::read(file) {
        Ok(text) => Ok(Some(
            serde_json::from_slice(&text).map_err(|error| failed(error.into()))?,
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_cannot_ask_for_itself() {
        let storage = tempfile::tempdir().unwrap();
        let at = |path: &str| storage.path().join(path);
        let ours = |value: &str| BTreeMap::from([("tailscale.tun".to_owned(), value.to_owned())]);
        let root = at("overlay/l1/merged");
        // No storage of theirs.
        allows(&ours("true"), Some(&root)).unwrap();
        allows(&ours("true"), None).unwrap();

        fs::create_dir_all(at("overlay-containers")).unwrap();
        fs::create_dir_all(at("overlay-images/i1")).unwrap();
        let unknown = allows(&ours("true"), Some(&root)).unwrap_err();
        assert!(unknown.contains("cannot tell"), "{unknown}");
        allows(&BTreeMap::new(), Some(&root)).unwrap();

        let list = r#"[{"id":"c0","layer":"l0"},{"id":"c1","layer":"l1","image":"i1"}]"#;
        fs::write(at("overlay-containers/volatile-containers.json"), list).unwrap();
        let manifest = at("overlay-images/i1/manifest");
        fs::write(&manifest, r#"{"schemaVersion":2,"annotations":null}"#).unwrap();
        allows(&ours("true"), Some(&root)).unwrap();
        allows(&ours("true"), Some(&at("overlay/l0/merged"))).unwrap();

        fs::write(&manifest, r#"{"annotations":{"tailscale.tun":"true"}}"#).unwrap();
        let refused = allows(&ours("true"), Some(&root)).unwrap_err();
        assert!(refused.contains("its image's"), "{refused}");
        allows(&ours("false"), Some(&root)).unwrap();

        fs::write(&manifest, "{").unwrap();
        allows(&ours("true"), Some(&root)).unwrap_err();
    }
}
