use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use tempfile::TempDir;

/// A private CA, which no machine knows until it is told: [`crate::Namespace::trust`].
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    /// A new one.
    #[allow(
        clippy::new_without_default,
        reason = "an authority is a thing, not a value"
    )]
    pub fn new() -> Authority {
        let directory = TempDir::new().expect("a directory for certificates");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "a private CA");
        let key = KeyPair::generate().expect("the CA's key");
        let certificate = params.self_signed(&key).expect("the CA's certificate");
        fs::write(directory.path().join("ca.crt"), certificate.pem()).expect("write it");
        Authority {
            issuer: Issuer::new(params, key),
            directory,
        }
    }

    /// The file with its own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// Where the certificates and keys are that it has issued, as `ADDRESS.crt` and `ADDRESS.key`.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Makes a certificate for the server at an address; returns its file and that of its key.
    pub fn issue(&self, address: Ipv4Addr) -> (PathBuf, PathBuf) {
        let params = CertificateParams::new([address.to_string()]).expect("an address");
        let key = KeyPair::generate().expect("the server's key");
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("the server's certificate");
        let file = |end| self.directory.path().join(format!("{address}.{end}"));
        fs::write(file("crt"), certificate.pem()).expect("write the server's certificate");
        fs::write(file("key"), key.serialize_pem()).expect("write the server's key");
        (file("crt"), file("key"))
    }
}
