"Folders and tables as people have them: each kind of folder and file with the classes, splits and labels that are right."
import os, unicodedata
from pathlib import Path
import pytest
from openpyxl import Workbook
from plant_mlops.core.config import PlantError, settings
from plant_mlops.data.catalog import list_pending, list_rows, list_stored, open_catalog, record_results
from plant_mlops.data.catalog_files import add_folder, load_file

JPEG = b'\xff\xd8\xff\xe0' + b'\0' * 60 # enough to tell the format
HEIC = b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + b'\0' * 40
AVIF = b'\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf' + b'\0' * 40

@pytest.fixture
def engine(tmp_path):
    "An empty catalog."
    engine = open_catalog(settings(home=tmp_path/'home'))
    yield engine
    engine.dispose()

@pytest.fixture
def root(tmp_path):
    "An empty folder of photos."
    (tmp_path/'d').mkdir()
    return tmp_path/'d'

def write_files(root, *names, content=JPEG):
    for name in names:
        file = root/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

def column_values(engine, *columns) -> list:
    return [tuple(row[column] for column in columns) for row in list_rows(engine)]

def names_of(engine) -> list:
    "Names of the files in the catalog, sorted."
    return sorted(Path(row['url_source']).name for row in list_rows(engine))

# -- Folders

@pytest.mark.parametrize('folders, expected', [
    (['train/fern', 'train/moss', 'valid/fern', 'test/moss'],
     {('fern', 'train'), ('moss', 'train'), ('fern', 'valid'), ('moss', 'test')}),
    (['Training/fern', 'Validation/fern', 'Testing/moss'], {('fern', 'train'), ('fern', 'valid'), ('moss', 'test')}),
    (['fern/train', 'fern/val', 'moss/train', 'moss/val'],
     {('fern', 'train'), ('fern', 'valid'), ('moss', 'train'), ('moss', 'valid')}),
    (['images/train/fern', 'images/test/moss'], {('fern', 'train'), ('moss', 'test')}),
    (['plants v2/train/fern', 'plants v2/val/moss'], {('fern', 'train'), ('moss', 'valid')}),
    (['train_set/fern', 'test_set/moss'], {('fern', 'train'), ('moss', 'test')}),
    (['train/fern', 'train/moss'], {('fern', None), ('moss', None)}),
    (['fern', 'moss', 'test'], {('fern', None), ('moss', None), ('test', None)}),
    (['images/fern', 'images/moss'], {('fern', None), ('moss', None)}),
    (['fern/2023/june', 'moss/2024'], {('fern', None), ('moss', None)}),
    (['fern/train/2023', 'fern/val/2023', 'moss/train/2024'], {('fern', 'train'), ('fern', 'valid'), ('moss', 'train')}),
    (['test_set/test_set/fern', 'training_set/training_set/fern'], {('fern', 'test'), ('fern', 'train')}),
    (['N/N/train/fern', 'N/N/train/moss', 'N/N/valid/fern', 'test/test'],
     {('fern', 'train'), ('moss', 'train'), ('fern', 'valid')}),
    (['seg_train/fern', 'seg_test/moss', 'seg_pred/fern'], {('fern', 'train'), ('moss', 'test'), ('seg_pred', None)}),
    (['TrainData/fern', 'ValData/fern'], {('fern', 'train'), ('fern', 'valid')}),
    (['val/fern', 'test/moss'], {('fern', 'valid'), ('moss', 'test')}),
    (['train1/fern', 'train2/moss'], {('fern', None), ('moss', None)}),
    (['d/fern', 'd/moss'], {('fern', None), ('moss', None)}),
    (['site 1/train/fern', 'site 1/val/moss', 'site 2/train/fern', 'site 2/val/moss'], {('fern', 'train'), ('moss', 'valid')})])
def test_classes_and_splits_are_read_from_folders(engine, root, folders, expected):
    write_files(root, *(f'{folder}/1.jpg' for folder in folders))
    add_folder(engine, root)
    assert set(column_values(engine, 'label', 'split')) == expected

def test_notes_say_how_folders_were_read(engine, root):
    write_files(root, 'train/fern/2023/1.jpg', 'test/fern/2.jpg', 'extra/3.jpg')
    notes = ' '.join(add_folder(engine, root).notes)
    assert '1 test, 1 train, 1 without a split' in notes and 'fern/2023 is fern' in notes

def test_photos_without_a_class_are_skipped_and_named(engine, root):
    write_files(root, '0.jpg', 'fern/1.jpg')
    assert '1 photos (0.jpg)' in ' '.join(add_folder(engine, root).notes)
    assert names_of(engine) == ['1.jpg']

def test_photos_are_recognised_by_their_content(engine, root):
    write_files(root, *(f'fern/{name}' for name in ('1.jfif', '2.jpe', '3.pjpeg', '4', '5.txt', '6.JPG')))
    write_files(root, 'fern/7.heic', 'fern/8.jpg', content=HEIC)
    write_files(root, 'fern/9.avif', content=AVIF)
    write_files(root, 'fern/IMG_1.MOV', content=b'\0\0\0\x14ftypqt  \0\0\0\0qt  ')
    write_files(root, 'fern/IMG_1.AAE', 'fern/notes.jpg', content=b'<?xml version="1.0"?>')
    write_files(root, 'fern/empty.jpg', content=b'')
    write_files(root, 'fern/10.NEF', content=b'II*\0')
    notes = ' '.join(add_folder(engine, root).notes)
    assert names_of(engine) == ['1.jfif', '2.jpe', '3.pjpeg', '4', '5.txt', '6.JPG', '7.heic', '8.jpg', '9.avif']
    assert '1 MOV video' in notes and '2 XML' in notes and '1 empty file' in notes and '1 raw photo' in notes

def test_folders_of_devices_are_skipped(engine, root):
    system = ('@eaDir', '#recycle', '$RECYCLE.BIN', 'lost+found', 'System Volume Information', '.Trashes', '@Recycle')
    write_files(root, 'fern/1.jpg', *(f'{name}/2.jpg' for name in system), 'fern/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg')
    write_files(root, 'fern/Thumbs.db', 'fern/.DS_Store', 'fern/._1.jpg')
    notes = ' '.join(add_folder(engine, root).notes)
    assert column_values(engine, 'label') == [('fern',)]
    assert 'belong to a device' in notes

def test_labels_are_normalised_and_similar_ones_are_named(engine, root):
    write_files(root, *(f'{unicodedata.normalize(form, "Löwenzahn")}/{form}.jpg' for form in ('NFC', 'NFD')))
    write_files(root, 'fern /1.jpg', 'fern/2.jpg', 'Fern/3.jpg', 'fern\u200e/4.jpg')
    notes = ' '.join(add_folder(engine, root).notes)
    assert {label for label, in column_values(engine, 'label')} == {'L\u00f6wenzahn', 'fern', 'Fern'}
    assert "'Fern' and 'fern'" in notes

def test_a_folder_of_a_wrapper_or_a_split_with_strays_keeps_its_classes(engine, root):
    write_files(root, 'images/cover.jpg', 'images/train/cover.jpg', *(f'images/{split}/{name}/1.jpg'
                for split in ('train', 'test') for name in ('fern', 'moss')))
    assert 'images/cover.jpg, images/train/cover.jpg' in ' '.join(add_folder(engine, root).notes)
    assert {label for label, in column_values(engine, 'label')} == {'fern', 'moss'}

@pytest.mark.parametrize('folders', [('images/train', 'images/val'), ('train/images', 'valid/images'), ('train', 'test')])
def test_a_folder_without_classes_is_an_error(engine, root, folders):
    write_files(root, *(f'{folder}/1.jpg' for folder in folders))
    with pytest.raises(PlantError, match='no photo in a folder of a class'): add_folder(engine, root)

def test_a_single_class_with_subfolders_is_pointed_out(engine, root):
    write_files(root, 'flowers/rose/1.jpg', 'flowers/tulip/2.jpg')
    assert f'add {root}/flowers' in ' '.join(add_folder(engine, root).notes)

def test_links_are_followed_once_and_after_real_folders(engine, root, tmp_path):
    write_files(root, 'zebra/1.jpg')
    write_files(tmp_path, 'elsewhere/2.jpg')
    (root/'ant').symlink_to(root/'zebra')
    (root/'fern').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'elsewhere/again').symlink_to(root)
    (root/'loop').symlink_to(root/'loop')
    result = add_folder(engine, root)
    assert result.new == 2 and sorted(column_values(engine, 'label')) == [('fern',), ('zebra',)]
    assert 'ant was not read' in ' '.join(result.notes)

def test_a_path_with_dots_is_the_same_folder(engine, root, monkeypatch):
    write_files(root, 'fern/1.jpg')
    add_folder(engine, root)
    monkeypatch.chdir(root)
    assert add_folder(engine, Path('../d')).new == 0

def test_file_names_that_are_not_text_are_added_and_printed(engine, root):
    write_files(root, os.fsdecode(b'foug\xe8re/\xe9t\xe9.jpg'), os.fsdecode(b'foug\xe8re/\xe9t\xe9.mov'))
    os.rename(os.fsencode(root) + b'/foug\xe8re/\xe9t\xe9.mov', os.fsencode(root) + b'/foug\xe8re/[\xe9].txt')
    (Path(os.fsdecode(os.fsencode(root) + b'/foug\xe8re/[\xe9].txt'))).write_text('notes')
    notes = ' '.join(add_folder(engine, root).notes).encode().decode()
    assert column_values(engine, 'label') == [('fougère',)] and '.txt' in notes

def test_unreadable_files_are_named(engine, root):
    write_files(root, 'fern/1.jpg')
    (root/'fern/2.jpg').symlink_to(root/'nowhere')
    assert 'fern/2.jpg was not read' in ' '.join(add_folder(engine, root).notes)

def store_all(engine, sha256='a' * 64):
    record_results(engine, [dict(id=row['id'], status='stored', sha256=sha256) for row in list_pending(engine)])

def test_of_a_photo_in_two_folders_the_newest_row_is_the_last(engine, root):
    write_files(root, 'fern/1.jpg')
    add_folder(engine, root)
    store_all(engine)
    (root/'moss').mkdir()
    (root/'fern/1.jpg').rename(root/'moss/1.jpg')
    result = add_folder(engine, root)
    store_all(engine)
    assert (result.new, result.gone) == (1, 1)
    assert [(row['label'], row['added_at'] is None) for row in list_stored(engine)] == [('fern', True), ('moss', False)]
    (root/'moss/1.jpg').rename(root/'fern/1.jpg')
    assert add_folder(engine, root).gone == 1
    assert [row['label'] for row in list_stored(engine)] == ['moss', 'fern'], 'it was moved back'

def test_the_rows_of_a_renamed_folder_are_said_to_have_no_file(engine, root):
    write_files(root, 'fern/1.jpg', 'moss/2.jpg')
    add_folder(engine, root)
    result = add_folder(engine, root.rename(root.parent/'e'))
    assert (result.new, result.gone, result.moved) == (2, 0, 2)
    assert [row['gone_at'] is None for row in list_rows(engine)] == [False, False, True, True]

def test_the_rows_of_a_disk_that_is_not_connected_are_not_marked(engine, root, tmp_path):
    write_files(tmp_path/'disk', 'fern/1.jpg')
    add_folder(engine, tmp_path/'disk')
    (tmp_path/'disk').rename(tmp_path/'disconnected')
    write_files(root, 'moss/2.jpg')
    assert add_folder(engine, root).moved == 0
    assert [row['gone_at'] for row in list_rows(engine)] == [None, None]

def test_rows_of_a_folder_that_cannot_be_read_are_kept(engine, root, monkeypatch):
    write_files(root, 'fern/1.jpg', 'moss/2.jpg')
    add_folder(engine, root)
    scandir = os.scandir
    def fail(path):
        if str(path).endswith('fern'): raise PermissionError(13, 'Permission denied')
        return scandir(path)
    monkeypatch.setattr('os.scandir', fail)
    result = add_folder(engine, root, mirror=True)
    assert result.gone == 0 and 'fern was not read: Permission denied' in ' '.join(result.notes)
    assert len(list_rows(engine)) == 2

def test_a_dry_run_changes_nothing(engine, root):
    write_files(root, 'fern/1.jpg', 'moss/2.jpg')
    add_folder(engine, root)
    (root/'fern/1.jpg').unlink()
    write_files(root, 'moss/3.jpg')
    before = list_rows(engine)
    result = add_folder(engine, root, mirror=True, dry_run=True)
    assert (result.new, result.gone) == (1, 1)
    assert list_rows(engine) == before

# -- Tables

URL = 'http://a.example/1.jpg'

def load(engine, tmp_path, content, name='table.csv', **options):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_file(engine, tmp_path/name, **options)

@pytest.mark.parametrize('content', [
    f'url_source, Label\n{URL}, fern \n', f'URL;Class\n{URL};fern\n;;\n;\n', f'sep=;\nurl;label\n{URL};fern\n',
    f'Image URL\tSpecies\n{URL}\tfern\n', f'label|url\nfern|{URL}\n', f'\ufeffurl_source,label\n{URL},fern\n',
    f'"url_source","label"\r\n"{URL}","fern"\r\n', f'\n\nurl_source,label\n\n{URL},fern\n\n',
    f'url_source,label,,,\n{URL},fern,,,\n', f'url_source;label\n{URL};fern\n'.encode('utf-16'),
    f'Plants of 2026\n\nurl_source,label\n{URL},fern\n'])
def test_tables_are_read_as_programs_write_them(engine, tmp_path, content):
    result = load(engine, tmp_path, content)
    assert (result.new, result.refused) == (1, [])
    assert column_values(engine, 'url_source', 'label') == [(URL, 'fern')]

def test_a_cp1252_table_is_read_with_a_note(engine, tmp_path):
    result = load(engine, tmp_path, f'url_source;label\n{URL};fougère\n'.encode('cp1252'))
    assert column_values(engine, 'label') == [('fougère',)]
    assert 'cp1252' in result.notes[0]

def test_another_encoding_can_be_named(engine, tmp_path):
    load(engine, tmp_path, f'url_source,label\n{URL},たんぽぽ\n'.encode('cp932'), encoding='cp932')
    assert column_values(engine, 'label') == [('たんぽぽ',)]

def save_workbook(path, *sheets, **changes) -> bytes:
    "An Excel file of lists of rows; `changes` are applied to the first sheet."
    workbook = Workbook()
    workbook.remove(workbook.active)
    for rows in sheets:
        sheet = workbook.create_sheet()
        for row in rows: sheet.append(row)
    first = workbook.worksheets[0]
    for cell, link in changes.get('links', {}).items(): first[cell].hyperlink = link
    for area in changes.get('merged', ()): first.merge_cells(area)
    workbook.save(path)
    return path.read_bytes()

@pytest.mark.parametrize('name', ['table.xlsx', 'table.csv'])
def test_an_excel_file_is_read(engine, tmp_path, name):
    rows = [['Photo', 'Label', 'Split'], ['click', 'fern', 'Training'], [URL + '?2', 7, None],
            ['=HYPERLINK("http://a.example/3.jpg", "see")', 'moss', 'val']]
    links = dict(A2=URL, B2='http://wiki.example/fern')
    content = save_workbook(tmp_path/'made.xlsx', rows, [['notes']], [['url', 'label'], [URL + '?4', 'ivy']], links=links)
    result = load(engine, tmp_path, content, name)
    assert column_values(engine, 'url_source', 'label', 'split') == [
        (URL, 'fern', 'train'), (URL + '?2', '7', None), ('http://a.example/3.jpg', 'moss', 'valid'), (URL + '?4', 'ivy', None)]
    assert '1 sheets without a column of URLs' in ' '.join(result.notes)

def test_a_merged_cell_labels_all_its_rows(engine, tmp_path):
    rows = [['url', 'label'], [URL, 'fern'], [URL + '?2', None], [URL + '?3', 'moss']]
    load(engine, tmp_path, save_workbook(tmp_path/'made.xlsx', rows, merged=['B2:B3']), 'table.xlsx')
    assert column_values(engine, 'label') == [('fern',), ('fern',), ('moss',)]

@pytest.mark.parametrize('header, row, expected', [
    ('class,order,species,identifier', f'Magnoliopsida,Rosales,fern,{URL}', (URL, 'fern')),
    ('url,image_url,species', f'http://page.example,{URL},fern', (URL, 'fern')),
    ('photo_url,photo_image_url,label', f'http://page.example,{URL},fern', (URL, 'fern')),
    ('url,label,class_name', f'{URL},0,fern', (URL, 'fern')), ('url,label', f'{URL},NULL', (URL, None)),
    ('url,label', f'{URL},#N/A', (URL, None)), ('"url", "label"', f'"{URL}", "fern, tree"', (URL, 'fern, tree')),
    ('url,label,fold', f'{URL},fern,3', (URL, 'fern')), ('url,label,set', f'{URL},fern,garden', (URL, 'fern')),
    ('url,label,split', f'{URL},fern,UNASSIGNED', (URL, 'fern'))])
def test_the_right_columns_and_values_are_read(engine, tmp_path, header, row, expected):
    load(engine, tmp_path, f'{header}\n{row}\n')
    assert column_values(engine, 'url_source', 'label') == [expected]

def test_a_quotation_mark_that_is_not_closed_refuses_its_row_only(engine, tmp_path):
    result = load(engine, tmp_path, f'url,label\n{URL},fern\n{URL}?2,"fern\n{URL}?3,moss\n{URL}?4,"moss, wet"\n')
    assert column_values(engine, 'label') == [('fern',), ('moss',), ('moss, wet',)]
    assert [row.position for row in result.refused] == ['Row 2 (line 3)']

def test_text_with_line_breaks_in_other_columns_is_read(engine, tmp_path):
    load(engine, tmp_path, f'url,note,label\n{URL},"two\nlines, ""quoted""",fern\n{URL}?2,,moss\n')
    assert column_values(engine, 'label') == [('fern',), ('moss',)]

def test_one_damaged_row_does_not_change_the_encoding_of_the_others(engine, tmp_path):
    result = load(engine, tmp_path, f'url,label\n{URL},Löwenzahn\n{URL}?2,Gänseblümchen\n{URL}?3,Fu\xdf\n'.encode('utf-8')
                  .replace('ß'.encode(), b'\xdf'))
    assert column_values(engine, 'label') == [('Löwenzahn',), ('Gänseblümchen',)]
    assert 'not text' in result.refused[0].reason

def test_a_table_without_labels_says_which_columns_it_has(engine, tmp_path):
    with pytest.raises(PlantError, match="'url_source', 'Etikett'"): load(engine, tmp_path, f'url_source,Etikett\n{URL},fern\n')
    with pytest.raises(PlantError, match="'Adresse', 'label'"): load(engine, tmp_path, f'Adresse,label\n{URL},fern\n')
    with pytest.raises(PlantError, match='Add a first row'): load(engine, tmp_path, f'{URL},fern\n')
    assert list_rows(engine) == []

def test_bad_rows_are_refused_with_their_number_and_the_others_loaded(engine, tmp_path):
    long_label = 'x' * 101
    rows = ['url_source,label', 'http://a.example/1.jpg,fern', 'ftp://a.example/2.jpg,fern', ',fern', 'http://[bad/1.jpg,fern',
            f'http://a.example/3.jpg,{long_label}', 'http://a.example/4.jpg,fern', 'http://a.example/4.jpg,moss']
    result = load(engine, tmp_path, '\n'.join(rows))
    assert column_values(engine, 'url_source') == [('http://a.example/1.jpg',)]
    assert sorted(row.position for row in result.refused) == [f'Row {n} (line {n + 1})' for n in range(2, 8)]

def test_long_urls_and_paths_of_any_script_are_loaded(engine, tmp_path):
    long_url = 'http://a.example/' + 'x' * 1600
    write_files(tmp_path, '写真/たんぽぽ.jpg', '写真/2.jpg', '写真/3.jpg')
    photo, second, third = (tmp_path/'写真'/name for name in ('たんぽぽ.jpg', '2.jpg', '3.jpg'))
    rows = [long_url, str(photo), second.as_uri(), '写真\\3.jpg', '写真/missing.jpg']
    result = load(engine, tmp_path, 'url,label\n' + ''.join(f'{url},fern\n' for url in rows))
    assert [url for url, in column_values(engine, 'url_source')] == [long_url, photo.as_uri(), second.as_uri(), third.as_uri()]
    assert str(tmp_path) in result.refused[0].reason

@pytest.mark.parametrize('content, name, message', [
    (b'PK\x03\x04broken', 'a.xlsx', 'readable Excel'), (b'\xd0\xcf\x11\xe0\xa1\xb1', 'a.xls', 'cannot be loaded'),
    (b'\xd0\xcf\x11\xe0\xa1\xb1', 'a.csv', 'xlsx'), ('<html><table>', 'a.csv', 'web page'),
    (bytes(range(256)), 'a.csv', 'zero bytes')],
    ids=['broken xlsx', 'xls', 'xls as csv', 'html', 'binary'])
def test_files_that_are_no_tables_are_refused(engine, tmp_path, content, name, message):
    with pytest.raises(PlantError, match=message): load(engine, tmp_path, content, name)

def test_a_script_with_damaged_bytes_is_refused(engine, tmp_path):
    script = "INSERT INTO plants_data (url_source, label) VALUES ('http://a.example/1', 'Löwenzahn é');\n".encode()
    with pytest.raises(PlantError, match='UTF-8'): load(engine, tmp_path, script + b'-- \xe9', 'a.sql')
    assert list_rows(engine) == []

def test_a_dry_run_of_a_table_or_a_script_adds_nothing(engine, tmp_path):
    assert load(engine, tmp_path, f'url_source,label\n{URL},fern\n', dry_run=True).new == 1
    assert load_file(engine, 'plants_data.sql', dry_run=True).new == 400
    assert list_rows(engine) == []
    with pytest.raises(PlantError, match='dry-run'): load(engine, tmp_path, 'DROP TABLE plants_data;\n', 'a.sql', dry_run=True)
    assert list_rows(engine) == []
